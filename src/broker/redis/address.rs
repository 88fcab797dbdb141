//! Where a Redis server is and how to get in: the address, its query, TLS and socket options. Shared with
//! the result backend.

use std::time::Duration;

use redis::io::tcp::{TcpSettings, socket2};
use redis::{Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion};
use redis::{RedisConnectionInfo, TlsCertificates};
use serde_json::{Map, Value};

/// An address taken apart, as kombu does it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Address {
    pub(crate) place: Place,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
    /// Database number.
    pub(crate) db: i64,
    /// The database as it was written, which is how it is shown.
    virtual_host: String,
    /// TLS, or none.
    pub(crate) tls: Option<Tls>,
    /// What the query says beside the database and TLS.
    pub(crate) query: Map<String, Value>,
}

/// The server's socket.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Place {
    Tcp { host: String, port: u16 },
    Unix(String),
}

impl Default for Place {
    fn default() -> Self {
        Self::Tcp { host: "localhost".to_owned(), port: 6379 }
    }
}

/// How the server's certificate is judged, and ours shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tls {
    /// False: any certificate will do (`CERT_NONE`).
    pub(crate) verify: bool,
    /// Whether the certificate must be for this host.
    pub(crate) check_hostname: bool,
    ca: Option<Vec<u8>>,
    certificate: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
}

/// How sockets behave.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Socket {
    /// Longest wait for the connection.
    pub(crate) connect_timeout: Option<Duration>,
    /// Longest wait for an answer.
    pub(crate) timeout: Option<Duration>,
    /// Probes the peer of an idle connection.
    pub(crate) keepalive: bool,
    /// Shown by `CLIENT LIST`.
    pub(crate) client_name: Option<String>,
}

impl Address {
    /// Reads `redis://`, `rediss://`, `redis+socket://` and `socket://`. The reason on failure is for the user.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or("there is no `://` in it")?;
        let scheme = scheme.strip_prefix("redis+").unwrap_or(scheme);
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (netloc, rest) = rest.split_at(end);
        let rest = rest.split('#').next().unwrap_or_default();
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (user, host) = netloc.rsplit_once('@').map_or((None, netloc), |(user, host)| (Some(user), host));
        let (username, password) = user.map_or((None, None), |user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            (unquote(name), unquote(password))
        });
        let mut query: Map<String, Value> =
            url::form_urlencoded::parse(query.as_bytes()).map(|(k, v)| (k.into_owned(), v.into())).collect();
        let place = match scheme {
            "socket" | "unix" => Place::Unix(unquote(path).ok_or("it names no socket file")?),
            "redis" | "rediss" => {
                let (host, port) = split_port(host)?;
                Place::Tcp { host: unquote(host).unwrap_or_else(|| "localhost".to_owned()), port }
            }
            other => return Err(format!("{other}:// is not an address of Redis")),
        };
        let named = ["virtual_host", "db"].into_iter().filter_map(|name| query.remove(name)).next_back();
        let virtual_host = match path.strip_prefix('/').unwrap_or(path) {
            "" => "/".to_owned(),
            host => host.to_owned(),
        };
        let db = match (&place, named) {
            (_, Some(Value::String(name))) => database(&name)?,
            (Place::Tcp { .. }, _) => database(&unquote(path).unwrap_or_default())?,
            (Place::Unix(_), _) => 0,
        };
        let tls = (scheme == "rediss").then(|| Tls { verify: true, check_hostname: true, ..Tls::default() });
        Ok(Self { place, username, password, db, virtual_host, tls, query })
    }

    /// Turns TLS on as `broker_use_ssl`, `redis_backend_use_ssl` and the query's `ssl_*` say. Whether any of them
    /// said something about certificates is the answer: nothing means different things to broker and backend.
    pub(crate) fn use_ssl(&mut self, setting: &Value) -> Result<bool, String> {
        let mut options: Map<String, Value> = Map::new();
        let names: Vec<String> = self.query.keys().filter(|name| name.starts_with("ssl_")).cloned().collect();
        for name in names {
            let value = self.query.remove(&name).unwrap_or_default();
            options.insert(name, value);
        }
        match setting {
            Value::Object(table) => options.extend(table.clone()),
            Value::Bool(true) => {
                self.tls.get_or_insert_with(|| Tls { verify: true, check_hostname: true, ..Tls::default() });
                return Ok(true);
            }
            Value::Null | Value::Bool(false) => {}
            other => return Err(format!("the TLS setting is {other}, not a table of options")),
        }
        if options.is_empty() {
            return Ok(false);
        }
        let mut tls = Tls { verify: true, check_hostname: true, ..Tls::default() };
        for (name, value) in &options {
            tls.option(name, value)?;
        }
        if tls.certificate.is_some() != tls.key.is_some() {
            return Err("ssl_certfile and ssl_keyfile must be given together".to_owned());
        }
        self.tls = Some(tls);
        Ok(options.contains_key("ssl_cert_reqs"))
    }

    /// As `Connected to …` shows it: kombu's form, which masks even a password that is not there.
    pub(crate) fn masked(&self) -> String {
        let name = quote(self.username.as_deref().unwrap_or_default());
        match &self.place {
            Place::Tcp { host, port } => {
                let scheme = if self.tls.is_some() { "rediss" } else { "redis" };
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                format!("{scheme}://{name}:**@{host}:{port}/{}", self.virtual_host)
            }
            Place::Unix(path) if self.password.is_some() => format!("redis+socket://{name}:**@{path}"),
            Place::Unix(path) => format!("redis+socket://{path}"),
        }
    }

    /// A client for this address. Nothing is connected yet.
    pub(crate) fn client(&self, protocol: ProtocolVersion, socket: &Socket) -> Result<Client, String> {
        let address = match &self.place {
            Place::Unix(path) => ConnectionAddr::Unix(path.into()),
            Place::Tcp { host, port } if self.tls.is_none() => ConnectionAddr::Tcp(host.clone(), *port),
            Place::Tcp { host, port } => {
                let insecure = self.tls.as_ref().is_some_and(|tls| !tls.verify);
                ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure, tls_params: None }
            }
        };
        let mut login = RedisConnectionInfo::default()
            .set_db(self.db)
            .set_protocol(protocol)
            .set_lib_name("celeriac", env!("CARGO_PKG_VERSION"));
        if let Some(name) = self.username.as_deref().filter(|name| !name.is_empty()) {
            login = login.set_username(name);
        }
        if let Some(password) = &self.password {
            login = login.set_password(password);
        }
        let mut tcp = TcpSettings::default().set_nodelay(true);
        if socket.keepalive {
            // Beside our own heartbeats: notices a peer that vanished while a reply is under way.
            let probe = Duration::from_secs(10);
            tcp = tcp.set_keepalive(socket2::TcpKeepalive::new().with_time(probe).with_interval(probe));
        }
        let info: ConnectionInfo = address
            .into_connection_info()
            .map_err(|error| error.to_string())?
            .set_redis_settings(login)
            .set_tcp_settings(tcp);
        let Some(tls) = self.tls.as_ref().filter(|_| matches!(self.place, Place::Tcp { .. })) else {
            return Client::open(info).map_err(|error| error.to_string());
        };
        let client_tls = match (&tls.certificate, &tls.key) {
            (Some(certificate), Some(key)) => {
                Some(ClientTlsConfig { client_cert: certificate.clone(), client_key: key.clone() })
            }
            _ => None,
        };
        let certificates = TlsCertificates { client_tls, root_cert: tls.ca.clone() };
        let client = Client::build_with_tls(info, certificates).map_err(|error| error.to_string())?;
        let info = client.get_connection_info().clone();
        let mut address = info.addr().clone();
        address.set_danger_accept_invalid_hostnames(!tls.check_hostname);
        Client::open(info.set_addr(address)).map_err(|error| error.to_string())
    }
}

impl Tls {
    /// Accepts any certificate, as kombu does for `rediss://` without options.
    pub(crate) fn insecure() -> Self {
        Self::default()
    }

    fn option(&mut self, name: &str, value: &Value) -> Result<(), String> {
        let text = value.as_str();
        let file = || {
            let path = text.ok_or_else(|| format!("{name} is {value}, not a path"))?;
            std::fs::read(path).map_err(|error| format!("{name} {path}: {error}"))
        };
        match name {
            _ if value.is_null() => {}
            "ssl_cert_reqs" => match (text, value.as_i64()) {
                // Python's ssl.CERT_NONE, CERT_OPTIONAL and CERT_REQUIRED are 0, 1 and 2. A client that asks
                // for an optional certificate verifies it: a server always sends one.
                (Some("none" | "CERT_NONE"), _) | (_, Some(0)) => self.verify = false,
                (Some("optional" | "required" | "CERT_OPTIONAL" | "CERT_REQUIRED"), _) | (_, Some(1 | 2)) => {
                    self.verify = true;
                }
                _ => {
                    return Err(format!(
                        "ssl_cert_reqs is {value}; it must be CERT_REQUIRED, CERT_OPTIONAL or CERT_NONE"
                    ));
                }
            },
            "ssl_check_hostname" => {
                self.check_hostname =
                    value.as_bool().unwrap_or(text.map(str::to_lowercase).as_deref() != Some("false"));
            }
            "ssl_ca_certs" => self.ca = Some(file()?),
            "ssl_ca_data" => self.ca = text.map(|text| text.as_bytes().to_vec()),
            "ssl_certfile" => self.certificate = Some(file()?),
            "ssl_keyfile" => self.key = Some(file()?),
            // These only narrow what the handshake already refuses or chooses.
            "ssl_min_version" | "ssl_ciphers" => {}
            other => return Err(format!("the TLS option {other} is not supported")),
        }
        Ok(())
    }
}

fn split_port(host: &str) -> Result<(&str, u16), String> {
    let (host, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':')),
        None => host.split_once(':').map_or((host, None), |(host, port)| (host, Some(port))),
    };
    match port.filter(|port| !port.is_empty()) {
        None => Ok((host, 6379)),
        Some(port) => port.parse().map(|port| (host, port)).map_err(|_| format!("{port:?} is not a port")),
    }
}

fn database(path: &str) -> Result<i64, String> {
    match path.trim_start_matches('/') {
        "" => Ok(0),
        number => number
            .parse()
            .ok()
            .filter(|number: &i64| *number >= 0)
            .ok_or_else(|| format!("the database must be a number, not {number:?}")),
    }
}

/// Percent-decodes; empty is none.
fn unquote(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = match (first, tail) {
            (b'%', [high, low, ..]) => {
                std::str::from_utf8(&[*high, *low]).ok().and_then(|code| u8::from_str_radix(code, 16).ok())
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[2..] } else { tail };
    }
    (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned())
}

fn quote(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tcp(host: &str, port: u16, db: i64) -> Address {
        Address { place: Place::Tcp { host: host.to_owned(), port }, db, ..Address::default() }
    }

    /// How it is shown has a test of its own.
    fn parsed(url: &str) -> Address {
        Address { virtual_host: String::new(), ..Address::parse(url).unwrap() }
    }

    #[test]
    fn addresses_are_taken_apart_as_kombu_does() {
        for (url, expected) in [
            ("redis://", tcp("localhost", 6379, 0)),
            ("redis://host", tcp("host", 6379, 0)),
            ("redis://host:7000/3", tcp("host", 7000, 3)),
            ("redis://host//", tcp("host", 6379, 0)),
            ("redis://[::1]:7000/1", tcp("::1", 7000, 1)),
            ("redis://h?virtual_host=4", tcp("h", 6379, 4)),
            ("redis://:p%40ss@host/2", Address { password: Some("p@ss".to_owned()), ..tcp("host", 6379, 2) }),
            (
                "redis://me:p:w@host",
                Address {
                    username: Some("me".to_owned()),
                    password: Some("p:w".to_owned()),
                    ..tcp("host", 6379, 0)
                },
            ),
            (
                "redis+socket:///run/redis.sock?virtual_host=5",
                Address { place: Place::Unix("/run/redis.sock".to_owned()), db: 5, ..Address::default() },
            ),
            (
                "socket://:pw@/run/redis.sock",
                Address {
                    place: Place::Unix("/run/redis.sock".to_owned()),
                    password: Some("pw".to_owned()),
                    ..Address::default()
                },
            ),
        ] {
            assert_eq!(parsed(url), expected, "{url}");
        }
    }

    #[test]
    fn a_wrong_address_says_what_is_wrong_with_it() {
        for (url, reason) in [
            ("redis://host/abc", "the database must be a number, not \"abc\""),
            ("redis://host/-1", "the database must be a number, not \"-1\""),
            ("redis://host:port", "\"port\" is not a port"),
            ("redis+socket://", "it names no socket file"),
        ] {
            assert_eq!(Address::parse(url).unwrap_err(), reason, "{url}");
        }
    }

    #[test]
    fn tls_options_come_from_the_setting_or_the_query() {
        let mut address = Address::parse("rediss://host?ssl_cert_reqs=none").unwrap();
        assert!(address.use_ssl(&Value::Null).unwrap());
        assert!(!address.tls.as_ref().unwrap().verify);
        let mut address = Address::parse("redis://host").unwrap();
        assert!(address.use_ssl(&json!({"ssl_cert_reqs": 2, "ssl_check_hostname": false})).unwrap());
        let tls = address.tls.unwrap();
        assert!(tls.verify && !tls.check_hostname);
        let mut address = Address::parse("rediss://host").unwrap();
        assert!(!address.use_ssl(&Value::Null).unwrap());
        for wrong in [
            json!({"ssl_cert_reqs": "maybe"}),
            json!({"ssl_ca_certs": "/no/such/file"}),
            json!({"ssl_certfile": "/dev/null"}),
            json!({"ssl_unheard_of": 1}),
        ] {
            assert!(Address::parse("rediss://host").unwrap().use_ssl(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_shown_address_is_kombus() {
        for (url, shown) in [
            ("redis://localhost", "redis://:**@localhost:6379//"),
            ("redis://localhost:6399/0", "redis://:**@localhost:6399/0"),
            ("redis://u:secret@h:7000/1", "redis://u:**@h:7000/1"),
            ("rediss://u@h/1", "rediss://u:**@h:6379/1"),
            ("redis+socket:///tmp/x.sock?virtual_host=2", "redis+socket:///tmp/x.sock"),
            ("redis+socket://:secret@/tmp/x.sock", "redis+socket://:**@/tmp/x.sock"),
        ] {
            assert_eq!(Address::parse(url).unwrap().masked(), shown);
        }
    }
}
