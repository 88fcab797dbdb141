//! A private RabbitMQ: its own node, ports, cookie and folders, no plugins. Started once per test binary,
//! since it takes seconds; each test has a virtual host of its own.
//!
//! `rabbitmq-server` of Debian insists on the user `rabbitmq`; the script that it wraps runs as anybody, also
//! as root in a container.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, MutexGuard};

use super::folder::Folder;
use super::process::{free_port, program};
use super::unique;

static SERVER: OnceLock<Option<RabbitServer>> = OnceLock::new();
static TROUBLED: OnceLock<Option<RabbitServer>> = OnceLock::new();
static TROUBLE: Mutex<()> = Mutex::const_new(());

/// A running node.
pub(crate) struct RabbitServer {
    folder: Folder,
    port: u16,
    tls_port: u16,
    environment: Vec<(&'static str, String)>,
    /// Its input is never written to. The keeper stops the node when this end of it closes: when the test
    /// binary ends, however.
    _keeper: Child,
}

/// Waits for the end of its input, then stops node and port mapper and removes their folder.
const KEEPER: &str = r#"
"$1" >"$2/out" 2>&1 </dev/null &
node=$!
cat >/dev/null
kill -TERM $node; wait $node
epmd -port "$ERL_EPMD_PORT" -kill >/dev/null 2>&1
rm -rf "$2"
"#;

impl RabbitServer {
    /// The server of this test binary. `None`: RabbitMQ is not installed here.
    pub(crate) fn shared() -> Option<&'static Self> {
        SERVER.get_or_init(Self::start).as_ref()
    }

    /// A second server, for tests that do harm to all who use it: one at a time.
    pub(crate) async fn troubled() -> Option<(&'static Self, MutexGuard<'static, ()>)> {
        let guard = TROUBLE.lock().await;
        Some((TROUBLED.get_or_init(Self::start).as_ref()?, guard))
    }

    /// Starts a node.
    pub(crate) fn start() -> Option<Self> {
        let script = script()?;
        // The ports were free when they were asked for; somebody may have been faster.
        for _ in 0..3 {
            let server = Self::spawn(&script);
            if server.becomes_ready(Duration::from_secs(90)) {
                return Some(server);
            }
            let said = fs::read_to_string(server.folder.path().join("out")).unwrap_or_default();
            eprintln!("rabbitmq-server did not start on port {}:\n{said}", server.port);
        }
        panic!("rabbitmq-server does not start");
    }

    fn spawn(script: &PathBuf) -> Self {
        let folder = Folder::new();
        let (port, tls_port) = (free_port(), free_port());
        let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        fs::write(path("plugins"), "[].").expect("a file can be written");
        fs::write(path("environment"), "").expect("a file can be written");
        let mut settings = format!("listeners.tcp.1 = 127.0.0.1:{port}\n");
        if certify(folder.path()) {
            settings += &format!(
                "listeners.ssl.1 = 127.0.0.1:{tls_port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
                 ssl_options.keyfile = {}\nssl_options.verify = verify_peer\n",
                path("ca.pem"),
                path("server.pem"),
                path("server.key"),
            );
        }
        fs::write(path("rabbit.conf"), settings).expect("a file can be written");
        let environment = vec![
            // The cookie is made in the home folder.
            ("HOME", path("")),
            ("RABBITMQ_NODENAME", format!("{}@localhost", unique("node"))),
            ("RABBITMQ_DIST_PORT", free_port().to_string()),
            ("ERL_EPMD_PORT", free_port().to_string()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
            ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".to_owned()),
            ("RABBITMQ_NODE_PORT", port.to_string()),
            ("RABBITMQ_MNESIA_BASE", path("mnesia")),
            ("RABBITMQ_LOG_BASE", path("log")),
            ("RABBITMQ_PID_FILE", path("pid")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins")),
            ("RABBITMQ_CONF_ENV_FILE", path("environment")),
            ("RABBITMQ_CONFIG_FILE", path("rabbit")),
            ("RABBITMQ_GENERATED_CONFIG_DIR", path("config")),
            // Idle schedulers sleep: the machine is shared with the tests.
            ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+sbwt none +sbwtdcpu none +sbwtdio none".to_owned()),
        ];
        let keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(script)
            .arg(folder.path())
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell can be started");
        Self { folder, port, tls_port, environment, _keeper: keeper }
    }

    fn becomes_ready(&self, within: Duration) -> bool {
        let end = Instant::now() + within;
        while Instant::now() < end {
            if answers(self.port) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    }

    /// A fresh virtual host, open to guest.
    pub(crate) fn vhost(&self) -> Vhost<'_> {
        let name = unique("vhost");
        self.eval(&format!(
            "ok = rabbit_vhost:add(<<\"{name}\">>, <<\"tests\">>), ok = rabbit_auth_backend_internal:\
             set_permissions(<<\"guest\">>, <<\"{name}\">>, <<\".*\">>, <<\".*\">>, <<\".*\">>, <<\"tests\">>)."
        ));
        Vhost { server: self, name }
    }

    /// Has the node carry out an Erlang expression.
    pub(crate) fn eval(&self, expression: &str) -> String {
        self.control(&["eval", expression])
    }

    /// Runs `rabbitmqctl`.
    pub(crate) fn control(&self, arguments: &[&str]) -> String {
        let script = script().expect("the server was started from there").with_file_name("rabbitmqctl");
        let output = Command::new(script)
            .args(["-q"])
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .output()
            .expect("rabbitmqctl can be started");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        said
    }
}

/// A virtual host of one test. It is left to the node's end: deleting costs more than keeping.
pub(crate) struct Vhost<'server> {
    server: &'server RabbitServer,
    name: String,
}

impl Vhost<'_> {
    /// Its address.
    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/{}", self.server.port, self.name)
    }

    /// Its address by TLS, and the folder with `ca.pem` and `client.pem`. The server's certificate is for
    /// `rabbit.test`. `None`: `openssl` is not installed here.
    pub(crate) fn tls(&self) -> Option<(String, &Path)> {
        program("openssl")?;
        let url = format!("amqps://guest:guest@127.0.0.1:{}/{}", self.server.tls_port, self.name);
        Some((url, self.server.folder.path()))
    }

    /// The server's port.
    pub(crate) fn port(&self) -> u16 {
        self.server.port
    }

    /// The rows of a `rabbitmqctl list_…`, as JSON objects.
    pub(crate) fn list(
        &self,
        what: &str,
        columns: &[&str],
    ) -> Vec<serde_json::Map<String, serde_json::Value>> {
        let mut arguments = vec![what];
        // Connections and channels are listed for all virtual hosts.
        if !matches!(what, "list_connections" | "list_channels") {
            arguments.extend(["-p", &self.name]);
        }
        arguments.extend(["--formatter", "json"]);
        arguments.extend(columns);
        let said = self.server.control(&arguments);
        let mut rows: Vec<serde_json::Map<String, serde_json::Value>> =
            serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        if columns.contains(&"vhost") {
            rows.retain(|row| row["vhost"] == self.name.as_str());
        }
        rows
    }

    /// Has the broker close all connections.
    pub(crate) fn close_connections(&self) {
        self.server.control(&["close_all_connections", "-p", &self.name, "closed by a test"]);
    }

    /// Has the node carry out an Erlang expression; `VHOST` in it is this one.
    pub(crate) fn eval(&self, expression: &str) -> String {
        self.server.eval(&expression.replace("VHOST", &format!("<<\"{}\">>", self.name)))
    }
}

/// Makes an authority and certificates of it for the server and for a client (with its key).
const CERTIFY: &str = r#"
set -e
new="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
openssl req -x509 $new -keyout ca.key -out ca.pem -days 30 -subj /CN=authority
for name in server client; do
  openssl req $new -keyout $name.key -out $name.csr -subj /CN=$name
  printf 'subjectAltName=DNS:rabbit.test\nbasicConstraints=CA:FALSE\n' >extensions
  openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile extensions -out $name.pem
done
cat client.key >>client.pem
"#;

fn certify(folder: &Path) -> bool {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", CERTIFY])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    shell.status().is_ok_and(|status| status.success())
}

/// The server's own script, not Debian's wrapper around it.
fn script() -> Option<PathBuf> {
    let wrapped = PathBuf::from("/usr/lib/rabbitmq/bin/rabbitmq-server");
    if wrapped.is_file() { Some(wrapped) } else { program("rabbitmq-server") }
}

/// Whether a broker speaks there: it answers a version that it does not know with its own.
fn answers(port: u16) -> bool {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut answer = [0; 4];
    let asked = socket.set_read_timeout(Some(Duration::from_secs(5))).is_ok()
        && socket.write_all(b"AMQP\x09\x09\x09\x09").is_ok();
    asked && socket.read_exact(&mut answer).is_ok() && &answer == b"AMQP"
}
