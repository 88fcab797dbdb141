//! How the pipe of a child waits and writes where tasks are greenlets (python/celeriac/greenlets.py).
//!
//! All greenlets share a thread, which may wait in no system call of ours: it reads and writes what goes at once. Who
//! needs an answer is switched away from by the hub; threads that a task has started wait as they always do.

use std::thread::{self, ThreadId};

use bytes::{Buf, BytesMut};
use pyo3::prelude::*;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// The child's Python, as far as waiting goes.
pub(super) struct Hub {
    /// `wait(serial)` returns when the answer may be there, `behind()` has the rest of what is written seen to.
    python: Py<PyAny>,
    thread: ThreadId,
}

impl Hub {
    /// To be called by the thread of the greenlets.
    pub(super) fn new(python: Py<PyAny>) -> Self {
        Self { python, thread: thread::current().id() }
    }

    /// Whether a greenlet calls.
    pub(super) fn is_here(&self) -> bool {
        thread::current().id() == self.thread
    }

    /// Switches to other greenlets. No lock may be held: they come here too.
    pub(super) fn wait(&self, py: Python<'_>, serial: u64) -> PyResult<()> {
        self.python.call_method1(py, "wait", (serial,)).map(drop)
    }

    /// Says that something is left to write.
    pub(super) fn behind(&self, py: Python<'_>) -> PyResult<()> {
        self.python.call_method0(py, "behind").map(drop)
    }
}

/// Writes what the socket takes. A supervisor that is gone takes anything: the next read notices it.
pub(super) fn write_some(socket: impl std::os::fd::AsFd, out: &mut BytesMut) {
    while !out.is_empty() {
        match send(&socket, out, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => out.advance(count),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return,
            Err(_) => out.clear(),
        }
    }
}

/// Reads what is there; none when nothing is. No bytes: the other end is closed.
pub(super) fn read_some(socket: impl std::os::fd::AsFd, chunk: &mut [u8]) -> Option<usize> {
    loop {
        match recv(&socket, &mut *chunk, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Some(count),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return None,
            Err(_) => return Some(0),
        }
    }
}
