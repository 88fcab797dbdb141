//! The supervisor's end of the zygote's control socket.
//!
//! The zygote (python/celeriac/zygote.py) is a single-threaded process that has imported the app. It forks a child
//! when told to, signals one when told to, and reports how each died. It alone may signal a child: it is the
//! parent that reaps them, so a pid that it still lists cannot have been reused.
//!
//! A record on this socket is 13 bytes, little endian: `u8 kind · u32 child · u32 argument · i32 value`;
//! a fork request carries the child's socket, and a reload is followed by as many bytes of JSON as its argument says.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::Reload;
use crate::error::Error;

/// Names a child process; never reused. Its process is called `ForkPoolWorker-<number>`.
pub(super) type Number = u32;

/// What `celeriac.zygote.start` made: the zygote's pid and our end of its socket.
#[derive(Debug)]
pub struct ZygoteHandle {
    /// Control socket.
    pub socket: OwnedFd,
    /// Its process; a child of ours, so that nobody else may reap it.
    pub pid: u32,
}

/// What the pool asks of the zygote.
#[derive(Debug)]
pub(super) enum Command {
    /// Forks a child for the place `index` of the pool.
    Fork {
        number: Number,
        index: u32,
        /// Whether it runs an event loop.
        looped: bool,
        socket: OwnedFd,
        reports: mpsc::UnboundedSender<Report>,
    },
    /// Signals a child, with its whole process group where it leads one.
    Signal { number: Number, signal: i32, scope: Scope },
    /// Loads modules, for the children that it forks later.
    Reload(Reload),
}

/// Who gets a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The child alone.
    Process,
    /// Its process group, where the child leads one.
    Group,
}

/// What the zygote says of one child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// It runs.
    Forked { pid: u32 },
    /// It could not be forked: the error number.
    Failed { errno: i32 },
    /// The signal was sent.
    Signalled,
    /// It is dead: its exit code, or minus the signal that killed it, and the most KiB that it had resident.
    Exited { code: i32, peak: u32 },
}

const RECORD: usize = 13;

fn record(kind: u8, number: Number, argument: u32, value: i32) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[0] = kind;
    bytes[1..5].copy_from_slice(&number.to_le_bytes());
    bytes[5..9].copy_from_slice(&argument.to_le_bytes());
    bytes[9..13].copy_from_slice(&value.to_le_bytes());
    bytes
}

fn report(bytes: &[u8]) -> Option<(Number, Report)> {
    let bytes: &[u8; RECORD] = bytes.try_into().ok()?;
    let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    let value = i32::from_le_bytes(word(9));
    let report = match bytes[0] {
        1 => Report::Forked { pid: u32::try_from(value).ok()? },
        2 => Report::Failed { errno: value },
        3 => Report::Signalled,
        4 => Report::Exited { code: value, peak: u32::from_le_bytes(word(5)) },
        _ => return None,
    };
    Some((u32::from_le_bytes(word(1)), report))
}

/// Who is told of which child.
type Owners = Arc<Mutex<HashMap<Number, mpsc::UnboundedSender<Report>>>>;

/// The reading end of the live zygote: knows whom each report is for.
pub(super) struct Zygote {
    socket: OwnedReadHalf,
    buffer: BytesMut,
    pid: Pid,
    owners: Owners,
}

/// The writing end. Reading must go on while it waits: a zygote that cannot report does not read either.
pub(super) struct Orders {
    socket: OwnedWriteHalf,
    owners: Owners,
}

/// Takes the zygote over.
///
/// # Errors
/// When the handle is of no use.
pub(super) fn open(handle: ZygoteHandle) -> Result<(Zygote, Orders), Error> {
    let pid = i32::try_from(handle.pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| Error::Pool(format!("zygote: {} is no pid", handle.pid)))?;
    let socket = std::os::unix::net::UnixStream::from(handle.socket);
    let (read, write) = socket
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(socket))
        .map_err(|error| Error::Pool(format!("socket of zygote {}: {error}", handle.pid)))?
        .into_split();
    let owners = Owners::default();
    let zygote = Zygote { socket: read, buffer: BytesMut::new(), pid, owners: Arc::clone(&owners) };
    Ok((zygote, Orders { socket: write, owners }))
}

fn lock(owners: &Owners) -> MutexGuard<'_, HashMap<Number, mpsc::UnboundedSender<Report>>> {
    owners.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Orders {
    /// Passes commands on until nobody gives any or the zygote is gone. Dropping it hangs up.
    pub(super) async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        while let Some(command) = commands.recv().await {
            if self.give(command).await.is_err() {
                // A fork that was not asked for must not be waited for.
                lock(&self.owners).clear();
                return;
            }
        }
    }

    async fn give(&mut self, command: Command) -> io::Result<()> {
        match command {
            Command::Fork { number, index, looped, socket, reports } => {
                lock(&self.owners).insert(number, reports);
                let bytes = record(1, number, index, i32::from(looped));
                let control: &UnixStream = self.socket.as_ref();
                let sent = control
                    .async_io(Interest::WRITABLE, || {
                        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                        let mut ancillary = SendAncillaryBuffer::new(&mut space);
                        let sockets = [socket.as_fd()];
                        ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
                        let parts = [IoSlice::new(&bytes)];
                        Ok(sendmsg(control, &parts, &mut ancillary, SendFlags::NOSIGNAL)?)
                    })
                    .await?;
                self.socket.write_all(&bytes[sent..]).await
            }
            Command::Signal { number, signal, scope } => {
                let bytes = record(2, number, u32::from(scope == Scope::Group), signal);
                self.socket.write_all(&bytes).await
            }
            Command::Reload(reload) => {
                let text = serde_json::to_vec(&reload).map_err(io::Error::other)?;
                let length = u32::try_from(text.len()).map_err(io::Error::other)?;
                self.socket.write_all(&record(3, 0, length, 0)).await?;
                self.socket.write_all(&text).await
            }
        }
    }
}

impl Zygote {
    /// Waits for reports and hands each to the child's owner. Returns only when the zygote is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped.
    pub(super) async fn reports(&mut self) {
        loop {
            while self.buffer.len() >= RECORD {
                let bytes = self.buffer.split_to(RECORD);
                self.hand_over(&bytes);
            }
            if !matches!(self.socket.read_buf(&mut self.buffer).await, Ok(count) if count > 0) {
                return;
            }
        }
    }

    fn hand_over(&self, bytes: &[u8]) {
        let Some((number, report)) = report(bytes) else {
            tracing::error!(target: "celery.pool", ?bytes, "Unreadable report of the zygote: a bug of celeriac.");
            return;
        };
        let mut owners = lock(&self.owners);
        // A child whose owner has gone was given up on purpose.
        if let Some(owner) = owners.get(&number) {
            let _ = owner.send(report);
        }
        if matches!(report, Report::Failed { .. } | Report::Exited { .. }) {
            owners.remove(&number);
        }
    }

    /// Waits for the end of a zygote that was hung up on, and reaps it. Says how it ended, as Celery words an
    /// exit status.
    pub(super) async fn end(self) -> String {
        let Self { socket, buffer: _, pid, owners } = self;
        lock(&owners).clear();
        drop(socket);
        let reaped = tokio::task::spawn_blocking(move || waitpid(Some(pid), WaitOptions::empty())).await;
        match reaped {
            Ok(Ok(Some((_, status)))) => human_status(exit_code(status)),
            // Somebody else reaped it.
            _ => "unknown status".to_owned(),
        }
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    match status.terminating_signal() {
        Some(signal) => -signal,
        None => status.exit_status().unwrap_or_default(),
    }
}

/// An exit code as Celery words it: `signal 9 (SIGKILL)`, `exitcode 1`.
pub(super) fn human_status(code: i32) -> String {
    if code >= 0 {
        return format!("exitcode {code}");
    }
    match signal_name(-code) {
        Some(name) => format!("signal {} ({name})", -code),
        None => format!("signal {}", -code),
    }
}

fn signal_name(number: i32) -> Option<&'static str> {
    // As in Linux on x86 and ARM. Not all: signals that no process dies of are left out.
    Some(match number {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        26 => "SIGVTALRM",
        27 => "SIGPROF",
        31 => "SIGSYS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_worded_as_celery_words_them() {
        for (code, text) in
            [(0, "exitcode 0"), (155, "exitcode 155"), (-9, "signal 9 (SIGKILL)"), (-63, "signal 63")]
        {
            assert_eq!(human_status(code), text);
        }
    }

    #[test]
    fn reports_are_read_and_anything_else_is_refused() {
        assert_eq!(report(&record(1, 7, 0, 42)), Some((7, Report::Forked { pid: 42 })));
        assert_eq!(report(&record(4, 7, 640, -9)), Some((7, Report::Exited { code: -9, peak: 640 })));
        assert_eq!(report(&record(9, 7, 0, 0)), None);
        assert_eq!(report(&record(1, 7, 0, -1)), None);
        assert_eq!(report(b"short"), None);
    }
}
