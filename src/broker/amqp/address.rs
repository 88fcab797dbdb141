//! Where the broker is and how to log in: kombu's reading of an AMQP address.

use std::time::Duration;

use serde_json::Value;

use crate::broker::BrokerConfig;
use crate::error::{BrokerError, mask};

/// An address with everything that kombu fills in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Address {
    /// `amqp` or `amqps`, as `Connected to …` shows it.
    pub(crate) scheme: &'static str,
    /// Host name or IP address, without brackets.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// User.
    pub(crate) user: String,
    /// Password.
    pub(crate) password: String,
    /// Virtual host.
    pub(crate) vhost: String,
    /// How to log in.
    pub(crate) login: Login,
    /// The heartbeat to ask for; zero leaves it to the server.
    pub(crate) heartbeat: Duration,
    /// Longest wait for TCP, TLS and login together.
    pub(crate) timeout: Duration,
    /// TLS, or none.
    pub(crate) tls: Option<TlsOptions>,
    /// `broker_transport_options["client_properties"]`, those that are text.
    pub(crate) client_properties: Vec<(String, String)>,
}

/// SASL mechanisms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Login {
    /// User and password.
    Plain,
    /// User and password in a table; an old form of RabbitMQ's.
    AmqPlain,
    /// The TLS certificate says who we are.
    External,
}

/// `broker_use_ssl`, as py-amqp understands it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct TlsOptions {
    /// `keyfile`: the client's private key, PEM.
    pub(crate) key_file: Option<String>,
    /// `certfile`: the client's certificate chain, PEM.
    pub(crate) certificate_file: Option<String>,
    /// `ca_certs`: whom to trust instead of the system's list, PEM.
    pub(crate) authorities_file: Option<String>,
    /// `cert_reqs`.
    pub(crate) verify: Verify,
    /// `server_hostname`: the name that the certificate must carry.
    pub(crate) name: Name,
}

/// The name that the server's certificate must carry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Name {
    /// Any: py-amqp checks none unless it is told to.
    #[default]
    Unchecked,
    /// The host's, `server_hostname: None`.
    Host,
    /// This one.
    Given(String),
}

/// How the server's certificate is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Verify {
    /// `CERT_REQUIRED`, the default.
    #[default]
    Required,
    /// `CERT_NONE`.
    Nothing,
}

/// `broker_connection_timeout` where the app says nothing, as Celery's.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(4);

impl Address {
    /// Reads an address. `None`: the scheme is not AMQP.
    ///
    /// # Errors
    /// [`BrokerError::Address`] when the scheme is AMQP and the rest is wrong.
    pub(crate) fn parse(url: &str, config: &BrokerConfig) -> Result<Option<Self>, BrokerError> {
        let wrong = |reason: String| BrokerError::Address { address: mask(url), reason };
        let Some((scheme, rest)) = url.split_once("://") else { return Ok(None) };
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "amqp" | "pyamqp" | "librabbitmq" => "amqp",
            "amqps" => "amqps",
            _ => return Ok(None),
        };
        // As Python's urlparse splits: the authority ends at the first of `/?#`.
        let rest = rest.split('#').next().unwrap_or_default();
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (userinfo, place) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
        let (host, port) = host_and_port(place).map_err(wrong)?;
        let or = |text: String, default: &str| if text.is_empty() { default.to_owned() } else { text };

        let mut heartbeat = config.heartbeat.unwrap_or_default();
        let mut timeout = config.connection_timeout;
        let mut login = config.login_method.clone();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match name.as_ref() {
                "heartbeat" => heartbeat = seconds(&name, &value).map_err(wrong)?,
                "connect_timeout" => timeout = Some(seconds(&name, &value).map_err(wrong)?),
                "login_method" => login = Some(value.into_owned()),
                _ => return Err(wrong(format!("unknown option {name:?}"))),
            }
        }
        let tls = tls(scheme, &config.use_ssl).map_err(wrong)?;
        let default_port = if tls.is_some() { 5671 } else { 5672 };
        // As kombu: "localhost" may resolve to ::1, where RabbitMQ often does not listen.
        let host = match or(host, "localhost") {
            host if host == "localhost" => "127.0.0.1".to_owned(),
            host => host,
        };
        let timeout = timeout.filter(|timeout| *timeout > 0.0).map_or(CONNECTION_TIMEOUT, duration);
        Ok(Some(Self {
            scheme,
            host,
            port: port.unwrap_or(default_port),
            user: or(unquote(user), "guest"),
            password: or(unquote(password), "guest"),
            vhost: or(unquote(path), "/"),
            login: login_method(login.as_deref()).map_err(wrong)?,
            heartbeat: duration(heartbeat),
            timeout,
            tls,
            client_properties: client_properties(config),
        }))
    }

    /// The address as Celery prints it, password masked.
    pub(crate) fn masked(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{}://{}:**@{}:{}/{}", self.scheme, self.user, host, self.port, self.vhost)
    }

    /// A failure that connecting again may mend.
    pub(crate) fn lost(&self, reason: impl ToString) -> BrokerError {
        BrokerError::Connection { address: self.masked(), reason: reason.to_string() }
    }

    /// A failure that connecting again does not mend.
    pub(crate) fn refused(&self, reason: impl ToString) -> BrokerError {
        BrokerError::Refused { address: self.masked(), reason: reason.to_string() }
    }
}

fn client_properties(config: &BrokerConfig) -> Vec<(String, String)> {
    let table = config.transport_options.get("client_properties").and_then(Value::as_object);
    let entries = table.into_iter().flatten();
    entries.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

fn host_and_port(place: &str) -> Result<(String, Option<u16>), String> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("a '[' without its ']'")?;
            (host, after.strip_prefix(':').unwrap_or(""))
        }
        None => place.split_once(':').unwrap_or((place, "")),
    };
    let port = match port {
        "" => None,
        port => Some(port.parse().map_err(|_| format!("the port {port:?} is no number below 65536"))?),
    };
    Ok((unquote(host).to_lowercase(), port))
}

fn unquote(text: &str) -> String {
    // `+` stays a plus here, unlike in a query string.
    let escaped = text.replace('+', "%2B");
    url::form_urlencoded::parse(format!("x={}", escaped.replace('&', "%26")).as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

fn seconds(name: &str, value: &str) -> Result<f64, String> {
    value
        .parse::<f64>()
        .ok()
        .filter(|value| value.is_finite() && *value >= 0.0)
        .ok_or_else(|| format!("{name}={value:?} is no number of seconds"))
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn login_method(name: Option<&str>) -> Result<Login, String> {
    match name {
        None | Some("" | "PLAIN") => Ok(Login::Plain),
        Some("AMQPLAIN") => Ok(Login::AmqPlain),
        Some("EXTERNAL") => Ok(Login::External),
        Some(other) => Err(format!(
            "broker_login_method {other:?} is not supported; there are PLAIN, AMQPLAIN and EXTERNAL"
        )),
    }
}

fn tls(scheme: &str, use_ssl: &Value) -> Result<Option<TlsOptions>, String> {
    let table = match use_ssl {
        Value::Object(table) if !table.is_empty() => table,
        Value::Bool(true) => return Ok(Some(TlsOptions::default())),
        _ if scheme == "amqps" => return Ok(Some(TlsOptions::default())),
        _ => return Ok(None),
    };
    let mut options = TlsOptions::default();
    for (name, value) in table {
        let text = || match value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            other => Err(format!("broker_use_ssl: {name} is {other}, a path or name was expected")),
        };
        match name.as_str() {
            "keyfile" | "ssl_keyfile" => options.key_file = text()?,
            "certfile" | "ssl_certfile" => options.certificate_file = text()?,
            "ca_certs" | "ssl_ca_certs" => options.authorities_file = text()?,
            "server_hostname" => options.name = text()?.map_or(Name::Host, Name::Given),
            "cert_reqs" | "ssl_cert_reqs" => options.verify = verify(value)?,
            // What rustls decides itself, and better: TLS 1.2 and up, its own list of ciphers.
            "ssl_version" | "ciphers" | "tls_minimum_version" | "tls_maximum_version" => {}
            // Matters of Python's sockets that have no counterpart here.
            "do_handshake_on_connect" | "suppress_ragged_eofs" | "server_side" => {}
            _ => return Err(format!("broker_use_ssl: the option {name:?} is not supported")),
        }
    }
    if options.key_file.is_some() && options.certificate_file.is_none() {
        return Err("broker_use_ssl: keyfile without certfile".to_owned());
    }
    Ok(Some(options))
}

/// `ssl.CERT_NONE` is 0; it comes as a number, or by name from a settings file.
fn verify(value: &Value) -> Result<Verify, String> {
    let name = match value {
        Value::Null => return Ok(Verify::Required),
        Value::Number(number) if number.as_u64() == Some(0) => return Ok(Verify::Nothing),
        Value::Number(number) if matches!(number.as_u64(), Some(1 | 2)) => return Ok(Verify::Required),
        Value::String(name) => name.to_ascii_uppercase(),
        other => return Err(format!("broker_use_ssl: cert_reqs is {other}")),
    };
    match name.trim_start_matches("VERIFYMODE.").trim_start_matches("CERT_") {
        "NONE" => Ok(Verify::Nothing),
        "REQUIRED" | "OPTIONAL" => Ok(Verify::Required),
        _ => Err(format!("broker_use_ssl: cert_reqs is {value}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(value: Value) -> BrokerConfig {
        let mut all = json!({"urls": [], "retry": true, "retry_on_startup": true});
        for (name, value) in value.as_object().unwrap() {
            all[name] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    fn parse(url: &str) -> Address {
        Address::parse(url, &config(json!({}))).unwrap().unwrap()
    }

    #[test]
    fn what_an_address_leaves_out_is_filled_in_as_kombu_does() {
        for (url, shown) in [
            ("amqp://", "amqp://guest:**@127.0.0.1:5672//"),
            ("amqp://localhost//", "amqp://guest:**@127.0.0.1:5672//"),
            ("pyamqp://guest@LOCALHOST//", "amqp://guest:**@127.0.0.1:5672//"),
            ("librabbitmq://h/", "amqp://guest:**@h:5672//"),
            ("amqp://u:p@h:1/v", "amqp://u:**@h:1/v"),
            ("amqp://u:p@h/%2Fv", "amqp://u:**@h:5672//v"),
            ("amqps://u:p@h/v", "amqps://u:**@h:5671/v"),
            ("amqp://[::1]:7/v", "amqp://guest:**@[::1]:7/v"),
        ] {
            assert_eq!(parse(url).masked(), shown, "{url}");
        }
    }

    #[test]
    fn user_password_and_vhost_are_percent_decoded() {
        let address = parse("amqp://a%40b:p%2Fw%3A%26+c@h/my%20host");
        assert_eq!((address.user.as_str(), address.password.as_str()), ("a@b", "p/w:&+c"));
        assert_eq!(address.vhost, "my host");
    }

    #[test]
    fn options_of_the_address_win_over_settings() {
        let config =
            config(json!({"heartbeat": 120.0, "connection_timeout": 3.0, "login_method": "EXTERNAL"}));
        let address = Address::parse("amqp://h?heartbeat=7&login_method=AMQPLAIN", &config).unwrap().unwrap();
        assert_eq!(address.heartbeat, Duration::from_secs(7));
        assert_eq!(address.timeout, Duration::from_secs(3));
        assert_eq!(address.login, Login::AmqPlain);
    }

    #[test]
    fn broker_use_ssl_is_true_or_a_table_and_unknown_options_are_named() {
        let of = |ssl: Value| Address::parse("amqp://h", &config(json!({"use_ssl": ssl})));
        assert_eq!(of(json!(false)).unwrap().unwrap().tls, None);
        let plain = of(json!(true)).unwrap().unwrap();
        assert_eq!((plain.tls, plain.port), (Some(TlsOptions::default()), 5671));
        let table = of(json!({"ca_certs": "/ca", "certfile": "/c", "keyfile": "/k", "cert_reqs": 0}));
        let tls = table.unwrap().unwrap().tls.unwrap();
        assert_eq!(tls.verify, Verify::Nothing);
        assert_eq!(tls.authorities_file.as_deref(), Some("/ca"));
        assert_eq!(
            of(json!({"cert_reqs": "CERT_REQUIRED"})).unwrap().unwrap().tls.unwrap().verify,
            Verify::Required
        );
        assert!(of(json!({"colour": 1})).unwrap_err().to_string().contains("colour"));
    }

    #[test]
    fn a_wrong_address_is_an_error_without_the_password_and_another_scheme_is_not_ours() {
        let error = Address::parse("amqp://u:secret@h:port/v", &config(json!({}))).unwrap_err().to_string();
        assert!(error.contains("port") && !error.contains("secret"), "{error}");
        let gssapi = config(json!({"login_method": "GSSAPI"}));
        assert!(Address::parse("amqp://h", &gssapi).unwrap_err().to_string().contains("GSSAPI"));
        assert_eq!(Address::parse("redis://h", &config(json!({}))).unwrap(), None);
    }
}
