//! How a worker begins and ends: ready, heartbeats, the stages of a stop.

use std::time::Duration;

use tokio::time::Instant;

use super::consumer::{Consumer, Waiting};
use super::hooks::Notice;
use super::request::Request;
use super::shutdown::{Cause, Phase, Said};
use crate::broker::{Command, Settlement};
use crate::pool::JobId;

/// How long killed children may take at a cold stop, with their account; longer than the pool waits before it kills.
const COLD_PATIENCE: Duration = Duration::from_secs(8);

impl Consumer {
    pub(super) fn tell_ready(&mut self) {
        // A pool of no processes grows with the first task.
        let can_run = self.slots_up > 0 || self.pool.capacity() == 0;
        if self.connected && can_run && !self.ready_told {
            self.ready_told = true;
            self.hooks.notice(Notice::Ready);
            self.begin_to_beat();
        }
    }

    pub(super) fn on_cause(&mut self, cause: Cause) {
        let before = self.shutdown.phase;
        let busy = self.jobs.active().next().is_some() || self.desk.running() > 0;
        let Said { lines, shutting_down } = self.shutdown.step(cause, busy, &self.config.shutdown);
        for line in lines {
            self.hooks.notice(Notice::Say(line.to_owned()));
        }
        if let Some((signal, how, exit_code)) = shutting_down {
            self.hooks.notice(Notice::ShuttingDown { signal: signal.to_owned(), how, exit_code });
        }
        let phase = self.shutdown.phase;
        if before == Phase::Running && phase > Phase::Running {
            self.hooks.notice(Notice::Stopping { terminate: phase > Phase::Warm });
            self.give_back();
        }
        if phase == Phase::Soft && before < Phase::Soft {
            let timeout = self.config.shutdown.soft_timeout;
            tracing::warn!(target: "celery.worker", "Initiating Soft Shutdown, terminating in {timeout} seconds");
            self.stop_until = Some(Instant::now() + Duration::try_from_secs_f64(timeout).unwrap_or_default());
        }
        if phase == Phase::Cold && before < Phase::Cold {
            let running: Vec<JobId> = self.jobs.active().map(|(id, _)| id).collect();
            self.kill(&running);
            self.kill_calls();
            self.stop_until = Some(Instant::now() + COLD_PATIENCE);
        }
    }

    /// Stops fetching and puts everything that has not started back where it came from, in order.
    fn give_back(&mut self) {
        self.link.send(Command::Pause);
        let mut unstarted: Vec<Request> = self.ready.drain();
        for waiting in self.waiting.drain() {
            match waiting {
                Waiting::Eta(request) | Waiting::Limited(request) => unstarted.push(*request),
                Waiting::Parked { .. } => {}
            }
        }
        (self.etas, self.limited) = (0, 0);
        for request in unstarted {
            self.link.settle(request.handle.settle(Settlement::GiveBack));
        }
        self.link.flush();
    }

    pub(super) fn is_running(&self) -> bool {
        self.shutdown.phase == Phase::Running
    }

    pub(super) fn is_over(&self) -> bool {
        match self.shutdown.phase {
            Phase::Running => false,
            Phase::Hard => true,
            Phase::Warm | Phase::Soft | Phase::Cold => {
                self.jobs.is_empty()
                    && self.reports.is_empty()
                    && self.receiving.is_empty()
                    && self.desk.is_idle()
            }
        }
    }

    /// Lets go of everything when the worker leaves without waiting: the broker redelivers it.
    pub(super) fn abandon(&mut self) {
        self.drop_unstarted();
        self.desk.abandon();
        for id in self.jobs.all() {
            if let Some(job) = self.jobs.remove(id) {
                job.request.handle.abandon();
            }
        }
    }
}
