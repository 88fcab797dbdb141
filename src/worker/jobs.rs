//! The jobs that run, from the moment a slot takes them until the broker has been told.

use std::collections::HashMap;

use super::acks::Kill;
use super::hooks::{Incident, Report};
use super::request::Request;
use super::results::Write;
use super::schedule::Due;
use crate::broker::Settlement;
use crate::pool::{JobId, Outcome};

/// A job in the pool, or ended and not settled yet.
#[derive(Debug)]
pub(super) struct Running {
    /// The request.
    pub request: Request,
    /// The process that runs it.
    pub pid: u32,
    /// Wall time of its start.
    pub started: f64,
    /// The child has said that it started.
    pub accepted: bool,
    /// The broker has been told.
    pub acknowledged: bool,
    /// The worker killed its child.
    pub killed: Option<Kill>,
    /// Results that are not written yet.
    pub writes: u32,
    /// Continuations that the broker does not have yet.
    pub publishes: u32,
    /// Results that wait for the continuations; counted in `writes`.
    pub held: Vec<Write>,
    /// The parent is reporting its end.
    pub reporting: bool,
    /// How it ended: what to tell the broker when results are written and the report is done.
    pub ended: Option<Option<Settlement>>,
    /// It is over and only waits for results or a report.
    pub over: bool,
    /// How the child said that it ended, where that is to be told.
    pub outcome: Option<Outcome>,
}

impl Running {
    /// What the parent has to report of it.
    pub(super) fn report(&self, what: Incident) -> Report {
        let Request { message, info, .. } = &self.request;
        Report { what, message: message.clone(), info: info.clone(), pid: Some(self.pid) }
    }
}

/// Jobs of event loops.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OnLoops {
    /// All.
    pub(super) running: usize,
    /// Those that are settled only after they ended.
    pub(super) unsettled: usize,
}

/// Which limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Limit {
    /// Soft, seconds.
    Soft(f64),
    /// Hard, seconds.
    Hard(f64),
}

/// All jobs and their time limits.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    running: HashMap<JobId, Running>,
    limits: Due<(JobId, Limit)>,
    last: JobId,
    on_loops: OnLoops,
}

impl Jobs {
    /// A name for the next job.
    pub(super) fn next_id(&mut self) -> JobId {
        self.last += 1;
        self.last
    }

    /// Takes a job in, with its limits counted from `now` (seconds on any steady clock).
    pub(super) fn start(&mut self, id: JobId, job: Running, limits: (Option<f64>, Option<f64>), now: f64) {
        let (hard, soft) = limits;
        if let Some(soft) = soft {
            self.limits.push(now + soft, (id, Limit::Soft(soft)));
        }
        if let Some(hard) = hard {
            self.limits.push(now + hard, (id, Limit::Hard(hard)));
        }
        if job.request.policy.asynchronous {
            self.on_loops.running += 1;
            self.on_loops.unsettled += usize::from(job.request.policy.acks_late);
        }
        self.running.insert(id, job);
    }

    /// How many of them event loops have.
    pub(super) fn on_loops(&self) -> OnLoops {
        self.on_loops
    }

    /// When the first limit is due.
    pub(super) fn next_limit(&self) -> Option<f64> {
        self.limits.next()
    }

    /// The next limit that is due, of a job that still runs.
    pub(super) fn limit_due(&mut self, now: f64) -> Option<(JobId, Limit)> {
        while let Some((id, limit)) = self.limits.pop(now) {
            if self.running.get(&id).is_some_and(|job| !job.over) {
                return Some((id, limit));
            }
        }
        // Limits of ended jobs stay in the heap until they are due; do not let quick tasks with long limits pile up.
        let running = &self.running;
        self.limits.prune(running.len(), |(id, _)| running.contains_key(id));
        None
    }

    /// A job.
    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut Running> {
        self.running.get_mut(&id)
    }

    /// A job.
    pub(super) fn get(&self, id: JobId) -> Option<&Running> {
        self.running.get(&id)
    }

    /// Takes a job out.
    pub(super) fn remove(&mut self, id: JobId) -> Option<Running> {
        let job = self.running.remove(&id)?;
        if job.request.policy.asynchronous {
            self.on_loops.running -= 1;
            self.on_loops.unsettled -= usize::from(job.request.policy.acks_late);
        }
        Some(job)
    }

    /// The jobs that a child still runs.
    pub(super) fn active(&self) -> impl Iterator<Item = (JobId, &Running)> {
        self.running.iter().filter(|(_, job)| !job.over).map(|(id, job)| (*id, job))
    }

    /// Every job, running or not settled yet.
    pub(super) fn all(&self) -> Vec<JobId> {
        self.running.keys().copied().collect()
    }

    /// Whether no job runs or waits to be settled.
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}
