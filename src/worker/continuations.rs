//! What continues a task: published until the broker has it, before the task's result is written and its message
//! settled. A connection that is lost in between repeats the publication; a broker that refuses it fails the task.

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::oneshot;

use super::consumer::Consumer;
use super::hooks::Incident;
use super::results::Write;
use crate::broker::{Command, Publication};
use crate::error::{BrokerError, back_off};
use crate::pool::{JobId, StoreId};

/// Waits between attempts while the broker takes nothing; the link has waits of its own for its connection.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A message that continues a job.
#[derive(Debug)]
pub(super) struct Continuation {
    job: JobId,
    publication: Box<Publication>,
    /// The child that waits for the broker's word, if one does.
    confirm: Option<StoreId>,
    /// Attempts that have failed.
    failures: u32,
}

/// What became of a continuation.
#[derive(Debug)]
pub(super) enum Told {
    /// The broker has it.
    Confirmed(JobId, Option<StoreId>),
    /// It may not have it, and is to be asked again.
    Again(Continuation),
    /// It does not take it.
    Refused(JobId, Option<StoreId>, BrokerError),
}

/// Continuations that the broker has not confirmed yet.
pub(super) type Continuations = FuturesUnordered<BoxFuture<'static, Told>>;

impl Consumer {
    /// A child hands over what continues its job.
    pub(super) fn on_publish(&mut self, job: JobId, publication: Box<Publication>, confirm: Option<StoreId>) {
        if let Some(running) = self.jobs.get_mut(job) {
            running.publishes += 1;
        }
        self.go_on(Continuation { job, publication, confirm, failures: 0 });
    }

    fn go_on(&mut self, continuation: Continuation) {
        let (answer, answered) = oneshot::channel();
        self.link.send(Command::Publish(continuation.publication.clone(), answer));
        let (job, confirm) = (continuation.job, continuation.confirm);
        self.continuing.push(Box::pin(async move {
            match answered.await {
                Ok(Ok(())) => Told::Confirmed(job, confirm),
                Ok(Err(error)) if !error.is_retryable() => Told::Refused(job, confirm, error),
                // No answer: the session ended with it.
                unsure => {
                    let failures = continuation.failures + 1;
                    if let (Ok(Err(error)), 1) = (unsure, failures) {
                        tracing::error!(target: "celery.worker", %error, "What follows a task cannot be published; trying again.");
                    }
                    tokio::time::sleep(back_off(failures, FIRST_WAIT, LONGEST_WAIT)).await;
                    Told::Again(Continuation { failures, ..continuation })
                }
            }
        }));
    }

    pub(super) fn on_continued(&mut self, told: Told) {
        match told {
            Told::Confirmed(id, confirm) => {
                if let Some(store) = confirm {
                    self.pool.stored(store, None);
                }
                let Some(job) = self.jobs.get_mut(id) else { return };
                job.publishes = job.publishes.saturating_sub(1);
                if job.publishes == 0 {
                    for write in std::mem::take(&mut job.held) {
                        self.write(write);
                    }
                    self.finish(id);
                }
            }
            Told::Again(continuation) => self.go_on(continuation),
            Told::Refused(id, Some(store), error) => {
                // The child makes of it what Celery does.
                self.pool.stored(store, Some(error.to_string()));
                self.on_continued(Told::Confirmed(id, None));
            }
            Told::Refused(id, None, error) => self.on_refused(id, &error),
        }
    }

    /// As where Celery's publishing fails: the task has failed, whatever it returned.
    fn on_refused(&mut self, id: JobId, error: &BrokerError) {
        tracing::error!(target: "celery.worker", %error, "The broker refused what follows a task; the task has failed.");
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.publishes = job.publishes.saturating_sub(1);
        if job.reporting {
            return;
        }
        job.reporting = true;
        self.counts.failed(job.request.series, "OperationalError()");
        let held = std::mem::take(&mut job.held);
        let report = job.report(Incident::Unsent { reason: error.to_string() });
        // Its SUCCESS is not written.
        job.writes = job.writes.saturating_sub(u32::try_from(held.len()).unwrap_or(u32::MAX));
        self.unwritten = self.unwritten.saturating_sub(held.len());
        for store in held.into_iter().filter_map(|write| write.confirm) {
            self.pool.stored(store, Some(error.to_string()));
        }
        self.report(report, Some(id), None);
    }

    /// Hands a result to the writer.
    pub(super) fn write(&mut self, write: Write) {
        if let Some(writes) = &self.writes {
            // The writer ends after this loop; it cannot be gone.
            let _ = writes.send(write);
        }
    }
}
