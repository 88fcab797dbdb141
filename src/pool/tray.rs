//! Jobs that lie ready for a child beside the one that it runs: it takes the next by itself, and the supervisor can take
//! back what it has not taken.
//!
//! A child that has to be woken for every job costs more than an empty task does. But a job must never wait behind a
//! long one, and nobody knows which is long. So what lies ready is a queue of packets in the kernel of which both hold
//! the reading end: each packet goes to one of the two, whole, and whoever has it knows that the other has not.

use std::os::fd::OwnedFd;

use bytes::BytesMut;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use tokio::time::Instant;

use super::ipc::{self, ToChild};
use super::{Job, JobId};

/// How many jobs may lie ready.
pub(super) const DEPTH: usize = 4;
/// Longest packet; what is longer waits until its child is idle.
pub(crate) const LONGEST: usize = 32 * 1024;
/// A job that has run for so long (milliseconds) is none that others wait for.
pub(super) const LONG: std::time::Duration = std::time::Duration::from_millis(2);

/// The supervisor's ends.
#[derive(Debug)]
pub(super) struct Tray {
    near: OwnedFd,
    far: OwnedFd,
    scratch: BytesMut,
    /// Since when the child has been at what it is at.
    since: Instant,
}

impl Tray {
    /// An empty one, and the end for the child.
    pub(super) fn new() -> Result<(Self, OwnedFd), rustix::io::Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let theirs = fcntl_dupfd_cloexec(&far, 3)?;
        Ok((Self { near, far, scratch: BytesMut::new(), since: Instant::now() }, theirs))
    }

    /// Lays a job there. `false`: it is too long, or the kernel has no room.
    pub(super) fn put(&mut self, job: &Job) -> bool {
        if job.body.len() + job.headers.as_bytes().len() + job.properties.as_bytes().len() > LONGEST - 4096 {
            return false;
        }
        self.scratch.clear();
        ToChild::encode_run(job, &mut self.scratch);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.scratch.len() <= LONGEST && send(&self.near, &self.scratch, flags).is_ok()
    }

    /// Takes back what the child has not taken, in order.
    pub(super) fn take_back(&self) -> Vec<JobId> {
        let mut back = Vec::new();
        // The rest of each packet is of no interest: who put it there has the job.
        let mut start = [0; ipc::RUN_ID.end];
        while let Ok((count, _)) = recv(&self.far, &mut start[..], RecvFlags::DONTWAIT) {
            let Some(id) = start.get(ipc::RUN_ID).filter(|_| count == start.len()) else { break };
            back.push(JobId::from_le_bytes(std::array::from_fn(|at| id[at])));
        }
        back
    }

    /// The child begins what is next.
    pub(super) fn begins(&mut self) {
        self.since = Instant::now();
    }

    /// Whether the child has been at its job for so long that none should wait for it.
    pub(super) fn is_long(&self) -> bool {
        self.since.elapsed() > LONG
    }
}

/// What the child takes.
///
/// # Errors
/// `AGAIN` when nothing lies there.
#[cfg(any(test, feature = "python"))]
pub(crate) fn take(tray: impl std::os::fd::AsFd, into: &mut BytesMut) -> Result<(), rustix::io::Errno> {
    into.resize(LONGEST, 0);
    let taken = rustix::io::retry_on_intr(|| recv(&tray, &mut into[..], RecvFlags::DONTWAIT));
    into.truncate(taken.as_ref().map_or(0, |(count, _)| *count));
    taken.map(|_| ())
}
