//! A private Redis.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use super::folder::Folder;
use super::process::{Server, free_port, program};

/// A Redis server without persistence, on a port of its own.
pub(crate) struct RedisServer {
    server: Server,
    port: u16,
}

impl RedisServer {
    /// Starts one. `None`: Redis is not installed here.
    pub(crate) fn start() -> Option<Self> {
        Self::with(&[])
    }

    /// Starts one with more options.
    pub(crate) fn with(options: &[&str]) -> Option<Self> {
        let program = program("redis-server")?;
        // The port was free when it was asked for; somebody may have been faster.
        for _ in 0..5 {
            let port = free_port();
            let mut command = Command::new(&program);
            command.args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ]);
            command.args(options);
            let mut server = Server::spawn("redis-server", command, Folder::new());
            if server.becomes_ready(Duration::from_secs(20), |_| answers(port)) {
                return Some(Self { server, port });
            }
            eprintln!("redis-server did not start on port {port}:\n{}", server.log());
        }
        panic!("redis-server does not start");
    }

    /// Its address, database 0.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        self.server.kill();
    }
}

fn answers(port: u16) -> bool {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut answer = [0; 1];
    socket.write_all(b"PING\r\n").is_ok() && socket.read_exact(&mut answer).is_ok()
}
