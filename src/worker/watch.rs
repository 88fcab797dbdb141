//! The worker as probes and metrics see it: what is counted when, and the answers to the listener.

use super::consumer::{Consumer, Waiting};
use super::hooks::{About, Incident, LogRecord};
use super::jobs::Running;
use super::request::Request;
use super::shutdown::Phase;
use crate::clock;
use crate::metrics::{Counts, Figures, Refused, sent_at};
use crate::pool::Outcome;
use crate::probes::Question;

impl Consumer {
    pub(super) fn on_question(&mut self, question: Question) {
        // Whoever asked may have gone.
        match question {
            Question::Turn => {}
            Question::Ready(answer) => drop(answer.send(self.not_ready())),
            Question::Figures(answer) => drop(answer.send(Box::new(self.figures()))),
        }
    }

    /// Why the worker takes no tasks now, a line each.
    fn not_ready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.shutdown.phase > Phase::Running {
            reasons.push("the worker is stopping".to_owned());
        }
        if !self.connected {
            reasons.push(format!("not connected to the broker {}", self.link.broker().address()));
        } else if self.link.queues().is_empty() {
            reasons.push("no queue is consumed".to_owned());
        }
        reasons.extend(self.link.wanted().map(|queue| format!("queue {queue} is not consumed yet")));
        if self.slots_up == 0 {
            reasons.push("no child is up".to_owned());
        }
        reasons
    }

    fn figures(&self) -> Figures {
        let mut counts = self.counts.clone();
        counts.settled = self.link.settled();
        let count = |number: usize| number as u64;
        let parked = self.waiting.iter().filter(|(_, one)| matches!(one, Waiting::Parked { .. })).count();
        Figures {
            node: self.config.hostname.clone(),
            counts,
            queues: self.link.queues().iter().map(|queue| queue.name.clone()).collect(),
            rungs: self.config.rungs.clone(),
            tasks: self.config.rung_tasks.clone(),
            active: count(self.jobs.active().count() + self.desk.running()),
            processes: count(self.pool.pids().len()),
            slots: count(self.slots_up),
            reserved: count(self.ready.iter().count()) + u64::from(self.limited),
            scheduled: u64::from(self.etas),
            parked: count(parked),
            unsettled: count(self.link.unsettled()),
            prefetch: u64::from(self.wanted_prefetch().unwrap_or(0)),
            unwritten: count(self.unwritten),
            connected: self.connected,
            started: self.started_at,
        }
    }

    /// What task a line is about, where lines say that.
    pub(super) fn context(&self, request: &Request) -> Option<Box<About>> {
        self.config.log_tasks.then(|| Box::new(About::of(&request.headers)))
    }

    /// Logs a line about a request, where lines of its level are wanted.
    pub(super) fn log_about(&self, request: &Request, level: u8, line: impl FnOnce() -> String) {
        let wanted = match level {
            10 => self.config.log_debug,
            20 => self.config.log_info || self.config.log_debug,
            _ => true,
        };
        if wanted {
            let task = self.context(request);
            self.hooks.log(LogRecord {
                logger: "celery.worker.request",
                level,
                message: line(),
                data: None,
                task,
            });
        }
    }

    /// A child was given the task. One that bounced was counted before.
    pub(super) fn count_start(&mut self, request: &Request) {
        if request.bounced {
            return;
        }
        let sent = sent_at(&request.headers, &request.message);
        let waited = sent.map(|sent| clock::now() - request.eta.map_or(sent, |eta| eta.max(sent)));
        self.counts.started(request.series, waited);
    }
}

/// A message could not become a task.
pub(super) fn count_refusal(counts: &mut Counts, incident: &Incident) {
    match incident {
        Incident::Unknown { .. } => counts.refused(Refused::Unknown),
        Incident::Rejected { .. } => counts.refused(Refused::Malformed),
        Incident::Undecodable { .. } => counts.refused(Refused::Undecodable),
        Incident::BadEta { .. } => counts.refused(Refused::Eta),
        Incident::Revoked { .. }
        | Incident::WorkerLost { .. }
        | Incident::TimedOut { .. }
        | Incident::TaskRejected { .. }
        | Incident::Unsent { .. }
        | Incident::Cancelled => {}
    }
}

/// A task ended. What goes back to its queue ends elsewhere.
pub(super) fn count_end(counts: &mut Counts, job: &Running, outcome: &Outcome, incident: Option<&Incident>) {
    let series = job.request.series;
    match outcome {
        Outcome::Success { runtime, .. } => counts.succeeded(series, *runtime),
        Outcome::Failure { exception, .. } => counts.failed(series, exception),
        Outcome::Retry { .. } => counts.retried(series),
        Outcome::Ignored => counts.ignored(series),
        Outcome::Rejected { .. } => counts.rejected(series),
        Outcome::Undecodable { .. } | Outcome::Malformed { .. } => {
            incident.iter().for_each(|incident| count_refusal(counts, incident));
        }
        Outcome::Translated { .. } => {}
        Outcome::WorkerLost { .. } | Outcome::TimedOut { .. } | Outcome::Terminated => match incident {
            Some(Incident::WorkerLost { requeued: false, .. }) if job.request.policy.retry_on_worker_lost => {
                counts.retried(series);
            }
            Some(Incident::WorkerLost { requeued: false, .. }) => counts.failed(series, "WorkerLostError()"),
            Some(Incident::TimedOut { requeued: false, .. }) => counts.failed(series, "TimeLimitExceeded()"),
            Some(Incident::Cancelled) => counts.retried(series),
            // Counted when it was terminated, or it goes back.
            Some(_) | None => {}
        },
    }
}
