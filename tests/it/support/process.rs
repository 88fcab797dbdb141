//! Server processes: killed on drop, their log shown when the test fails.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::folder::Folder;

/// Where a program is, if it is installed. Absent where `CI=true`: a failure; elsewhere the test says that it
/// is skipped.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let extra = ["/usr/sbin", "/usr/local/sbin", "/usr/lib/rabbitmq/bin"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).chain(extra).map(|folder| folder.join(name)).find(|it| it.is_file());
    if found.is_none() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{name} is not installed, and this is CI");
        eprintln!("skipped: {name} is not installed");
    }
    found
}

/// A TCP port of the loopback interface that is free now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback interface has a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// A running server with a folder of its own.
pub(crate) struct Server {
    name: String,
    child: Child,
    folder: Folder,
}

impl Server {
    /// Starts `command` in a folder made by the caller, its output going to `log` in it.
    pub(crate) fn spawn(name: &str, mut command: Command, folder: Folder) -> Self {
        let log = File::create(folder.path().join("log")).expect("a log can be written");
        let errors = log.try_clone().expect("a descriptor can be duplicated");
        let child = command
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        Self { name: name.to_owned(), child, folder }
    }

    /// Waits until `ready` answers true. `false`: the process has ended, or the deadline has passed.
    pub(crate) fn becomes_ready(&mut self, deadline: Duration, mut ready: impl FnMut(&Path) -> bool) -> bool {
        let end = Instant::now() + deadline;
        loop {
            if ready(self.folder.path()) {
                return true;
            }
            if self.child.try_wait().expect("a child can be waited for").is_some() || Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the server has said, its last lines.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Kills it, as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- {} said:\n{}\n----", self.name, self.log());
        }
    }
}
