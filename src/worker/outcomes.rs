//! The other half of the loop: what the pool says of jobs, what the backend says of results, what the hooks
//! say of reports; and with all three, what the broker is told.

use tokio::sync::mpsc;

use super::acks::{self, Ending, Kill};
use super::consumer::{Consumer, Reported};
use super::hooks::{Incident, Notice, Report};
use super::jobs::{Limit, Running};
use super::request::Request;
use super::results::{What, Write, Written};
use super::shutdown::{Cause, Phase};
use super::told::{self, TaskEvent};
use super::watch;
use crate::broker::{Delivery, Handle, Settlement};
use crate::pool::{self, Interrupt, JobId, Outcome, StoreId};
use crate::protocol::Message;

/// Pool events taken in one turn before the broker is told of them.
const POOL_BATCH: usize = 256;

impl Consumer {
    pub(super) fn on_pool_events(
        &mut self,
        first: Option<pool::Event>,
        more: &mut mpsc::Receiver<pool::Event>,
    ) {
        let Some(first) = first else {
            self.broken.get_or_insert_with(|| "the pool ended".to_owned());
            self.shutdown.phase = Phase::Hard;
            self.shutdown.exit_code = 1;
            return;
        };
        self.on_pool(first);
        for _ in 0..POOL_BATCH {
            let Ok(event) = more.try_recv() else { break };
            self.on_pool(event);
        }
    }

    fn on_pool(&mut self, event: pool::Event) {
        match event {
            pool::Event::Up { .. } => {
                self.slots_up += 1;
                self.hooks.notice(Notice::Children(self.pool.pids()));
                self.tell_ready();
            }
            pool::Event::Down { .. } => {
                self.slots_up = self.slots_up.saturating_sub(1);
                self.hooks.notice(Notice::Children(self.pool.pids()));
            }
            // The loop looks for work after every event.
            pool::Event::Idle { .. } => {}
            pool::Event::Accepted { job } if self.on_call_accepted(job) => {}
            pool::Event::Accepted { job } => self.on_accepted(job),
            pool::Event::Answered { job, value } => self.on_answered(job, value),
            pool::Event::Store { job, record, confirm } => self.on_write(job, confirm, What::Record(record)),
            pool::Event::Part { job, part, confirm } => self.on_write(job, confirm, What::Part(part)),
            pool::Event::Publish { job, publication, confirm } => self.on_publish(job, publication, confirm),
            pool::Event::Ended { job, outcome } => self.on_ended(job, outcome),
            pool::Event::Gone(why) => self.counts.child_ended(why),
            pool::Event::Broken(reason) => {
                tracing::error!(target: "celery.worker", "Unrecoverable error: {reason}");
                self.broken = Some(reason);
                self.on_cause(Cause::Failure);
            }
        }
    }

    fn on_write(&mut self, job: JobId, confirm: Option<StoreId>, what: What) {
        if self.writes.is_none() {
            if let Some(store) = confirm {
                self.pool.stored(store, Some("this worker has no native result backend".to_owned()));
            }
            return;
        }
        self.unwritten += 1;
        let write = Write { job, confirm, what };
        if let Some(running) = self.jobs.get_mut(job) {
            running.writes += 1;
            // As Celery: a task that others see as done has been continued.
            if running.publishes > 0 {
                running.held.push(write);
                return;
            }
        }
        self.write(write);
    }

    fn on_accepted(&mut self, id: JobId) {
        if let Some(job) = self.jobs.get(id) {
            let line = || format!("Task accepted: {} pid:{}", job.request.human(), job.pid);
            self.log_about(&job.request, 10, line);
        }
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.accepted = true;
        let told = job.request.policy.send_events.then(|| job.request.headers.id.clone());
        if !job.request.policy.acks_late && !job.acknowledged {
            job.acknowledged = true;
            let tag = job.request.handle.tag();
            self.link.settle((tag, Settlement::Ack));
        }
        if let Some(uuid) = told {
            self.tell_task(&uuid, true, &[TaskEvent::Started {}]);
        }
    }

    fn on_ended(&mut self, id: JobId, outcome: Outcome) {
        let Some(outcome) = self.on_call_ended(id, outcome) else { return };
        let outcome = match outcome {
            Outcome::Translated { headers, body, content_type, content_encoding } => {
                let Some(Running { request, .. }) = self.jobs.remove(id) else { return };
                let properties = request.message.properties;
                let (content_type, content_encoding) = (Some(content_type), Some(content_encoding));
                let message = Message { content_type, content_encoding, headers, properties, body };
                self.on_delivery(Delivery { message, info: request.info, handle: request.handle });
                return;
            }
            outcome => outcome,
        };
        let tells = self.tells_tasks();
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.over = true;
        let untranslated = job.request.is_untranslated();
        let never_started =
            untranslated || (!job.accepted && !job.request.policy.acks_late && !job.acknowledged);
        if matches!(outcome, Outcome::WorkerLost { .. })
            && never_started
            && !job.request.bounced
            && job.killed.is_none()
        {
            // As in 5.7: a job that its child never began goes to another child. Once: a body that kills whoever
            // decodes it is lost at the second.
            if let Some(job) = self.jobs.remove(id) {
                self.ready.push_front(Request { bounced: true, ..job.request });
            }
            return;
        }
        let outcome = match outcome {
            Outcome::WorkerLost { status } if untranslated && job.killed.is_none() => {
                Outcome::Undecodable { reason: format!("the child that decoded it was lost: {status}") }
            }
            outcome => outcome,
        };
        let ending = Ending { acknowledged: job.acknowledged, killed: job.killed };
        let verdict = acks::settle(&job.request.policy, &outcome, ending);
        watch::count_end(&mut self.counts, job, &outcome, verdict.incident.as_ref());
        job.ended = Some(verdict.settlement);
        match verdict.incident {
            None => {
                job.outcome = (job.request.policy.send_events && tells).then_some(outcome);
                self.finish(id);
            }
            Some(mut what) => {
                // As billiard words it, for signals only; the number is that of the job.
                if let Incident::WorkerLost { status, .. } = &mut what
                    && status.starts_with("signal")
                {
                    status.push_str(&format!(" Job: {}", id.saturating_sub(1)));
                }
                job.reporting = true;
                let report = job.report(what);
                self.report(report, Some(id), None);
            }
        }
    }

    /// Settles a job that ended, once it is continued, its results are written and its report is done.
    pub(super) fn finish(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(id) else { return };
        let Some(settlement) = job.ended else { return };
        if job.publishes > 0 || job.writes > 0 || job.reporting {
            return;
        }
        let Some(job) = self.jobs.remove(id) else { return };
        if let Some(outcome) = &job.outcome {
            let events = told::of_outcome(outcome, settlement, job.killed);
            self.tell_task(&job.request.headers.id, true, &events);
        }
        match settlement {
            Some(settlement) => self.link.settle(job.request.handle.settle(settlement)),
            None => drop(job.request.handle.abandon()),
        }
    }

    pub(super) fn on_written(&mut self, written: Written) {
        self.unwritten = self.unwritten.saturating_sub(1);
        match written.error {
            None => self.counts.results_written += 1,
            Some(_) => self.counts.results_failed += 1,
        }
        match (written.confirm, written.counted) {
            (Some(store), Some(counted)) => self.pool.counted(store, counted),
            (Some(store), None) => self.pool.stored(store, written.error),
            (None, _) => {}
        }
        if let Some(job) = self.jobs.get_mut(written.job) {
            job.writes = job.writes.saturating_sub(1);
            self.finish(written.job);
        }
    }

    pub(super) fn on_limit(&mut self, id: JobId, limit: Limit) {
        let Some(job) = self.jobs.get(id) else { return };
        match limit {
            Limit::Soft(seconds) => {
                self.log_about(&job.request, 30, || {
                    let given = job.request.limit_text(seconds);
                    format!("Soft time limit ({given}s) exceeded for {}", job.request.human())
                });
                self.pool.interrupt(id, Interrupt::SoftLimit);
            }
            Limit::Hard(seconds) => self.pool.interrupt(id, Interrupt::HardLimit(seconds)),
        }
    }

    /// Kills the children of these jobs; their work is to be done again.
    pub(super) fn kill(&mut self, jobs: &[JobId]) {
        for id in jobs {
            if let Some(job) = self.jobs.get_mut(*id) {
                job.killed.get_or_insert(Kill::Cancelled);
                let signal = self.config.shutdown.terminate_signal();
                self.pool.interrupt(*id, Interrupt::Terminate(signal));
            }
        }
    }

    pub(super) fn report(
        &mut self,
        report: Report,
        job: Option<JobId>,
        refused: Option<(Handle, Settlement)>,
    ) {
        let hooks = self.hooks.clone();
        let subject = self.subject(&report);
        self.reports.spawn(async move {
            let account = hooks.report(report).await;
            Reported { job, refused, subject, account }
        });
    }

    pub(super) fn on_reported(&mut self, reported: Result<Reported, tokio::task::JoinError>) {
        let reported = match reported {
            Ok(reported) => reported,
            Err(error) => {
                tracing::error!(target: "celery.worker", %error, "A report failed: a bug of celeriac. The broker will redeliver its message.");
                return;
            }
        };
        let Reported { job, refused, subject, account } = reported;
        let mut settled = None;
        if let Some((handle, planned)) = refused {
            let settlement = account.settlement.unwrap_or(planned);
            settled = Some(settlement);
            self.link.settle(handle.settle(settlement));
        }
        if let Some(job) = job.and_then(|id| self.jobs.get_mut(id)) {
            job.reporting = false;
            if let (Some(Some(planned)), Some(answer)) = (&mut job.ended, account.settlement) {
                *planned = answer;
            }
            settled = job.ended.flatten();
        }
        self.tell_incident(&subject, &account, settled);
        if let Some(id) = job {
            self.finish(id);
        }
    }

    /// Kills the child that runs the task and reports it as revoked.
    pub(super) fn terminate_running(&mut self, id: JobId, signal: i32) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        if job.killed.is_some() || job.over {
            return;
        }
        job.killed = Some(Kill::Revoked(signal));
        self.counts.revoked(job.request.series);
        job.reporting = true;
        let what = Incident::Revoked {
            reason: "terminated",
            terminated: true,
            signal: Some(signal),
            expired: false,
        };
        let report = job.report(what);
        self.report(report, Some(id), None);
        self.pool.interrupt(id, Interrupt::Terminate(signal));
    }
}
