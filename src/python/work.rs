//! The next job of a child that takes what lies ready for it ([`crate::pool::tray`]), and what else it may be told
//! meanwhile.

use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pyo3::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::child::{ChildPipe, Inbox, Next, Wait, Wake};
use crate::pool::ipc::{ToChild, split};
use crate::pool::tray;

/// While another thread reads the socket, for an answer of its own, the tray is looked at so often.
const GLANCE: Duration = Duration::from_millis(2);

impl ChildPipe {
    /// Waits for a job, on the tray or from the socket, or for the word to leave.
    pub(super) fn next_work(&self, py: Python<'_>, tray: &OwnedFd) -> PyResult<Next> {
        while !self.tray_is_gone.load(Ordering::Relaxed) {
            if let Some(next) = self.ready_work(tray) {
                return Ok(next);
            }
            if let Wait::Interrupted = py.detach(|| self.wait_for_work(tray)) {
                py.check_signals()?;
            }
        }
        // Nothing more will lie there: we are to leave, or the supervisor is gone. The socket says which.
        self.wait(py, Inbox::next)
    }

    /// What lies on the tray comes first: the supervisor has taken it back where it is not wanted any more.
    fn ready_work(&self, tray: &OwnedFd) -> Option<Next> {
        let mut packet = self.packet();
        if tray::take(tray, &mut packet).is_ok() {
            if packet.is_empty() {
                self.tray_is_gone.store(true, Ordering::Relaxed);
                return self.inbox().next();
            }
            return match split(&mut packet).map(|payload| payload.map(ToChild::decode)) {
                Ok(Some(Ok(ToChild::Run(job)))) => Some(Next::Job(job)),
                // Both ends are of one build.
                _ => Some(Next::Closed),
            };
        }
        drop(packet);
        self.inbox().next()
    }

    /// Waits until there is something on the tray or something came over the socket, which is read.
    fn wait_for_work(&self, tray: &OwnedFd) -> Wait<()> {
        self.write_out(&mut self.writing());
        let mut inbox = self.inbox();
        let others = inbox.reading;
        if others {
            // A thread of the task's reads, and sorts what comes.
            inbox.waiting += 1;
            let (mut inbox, _) =
                self.arrived.wait_timeout(inbox, GLANCE).unwrap_or_else(PoisonError::into_inner);
            inbox.waiting -= 1;
            return Wait::Done(());
        }
        // Whoever waits for an answer meanwhile is told by us.
        inbox.reading = true;
        drop(inbox);
        let mut both = [PollFd::new(tray, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
        let polled = poll(&mut both, None::<&Timespec>);
        let came = both[1].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        let (wake, outcome) = match polled {
            Ok(_) if came => (self.read_once(), Wait::Done(())),
            Ok(_) => (Wake::Some(1), Wait::Done(())),
            Err(_) => (Wake::Some(1), Wait::Interrupted),
        };
        let mut inbox = self.inbox();
        inbox.reading = false;
        self.notify(&inbox, wake);
        outcome
    }
}
