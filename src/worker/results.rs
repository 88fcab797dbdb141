//! Writes results in batches, and again until the backend has them: an outage costs no finished work.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::backend::{Counted, Part, Record, ResultBackend};
use crate::error::{BackendError, back_off};
use crate::pool::{JobId, StoreId};

/// A result to be written, and who wants to know.
#[derive(Debug)]
pub(super) struct Write {
    /// Whose result; the job is not settled before it is written.
    pub job: JobId,
    /// The child that waits for it, if one does.
    pub confirm: Option<StoreId>,
    /// What to write.
    pub what: What,
}

/// What is written for a job.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// Its result.
    Record(Record),
    /// That it is a member of a chord, after its result.
    Part(Part),
}

/// A result that was written, or cannot be.
#[derive(Debug)]
pub(super) struct Written {
    /// As in [`Write`].
    pub job: JobId,
    /// As in [`Write`].
    pub confirm: Option<StoreId>,
    /// Why it cannot be written.
    pub error: Option<String>,
    /// For a member of a chord: the answer.
    pub counted: Option<Counted>,
}

/// Results written in one go; bounds a round trip, not the throughput.
const BATCH: usize = 256;
/// Waits between attempts while the backend is away.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Writes until the sender is dropped and everything is written.
pub(super) async fn run(
    backend: Arc<dyn ResultBackend>,
    mut writes: mpsc::UnboundedReceiver<Write>,
    written: mpsc::UnboundedSender<Written>,
) {
    let mut batch: Vec<Write> = Vec::with_capacity(BATCH);
    while writes.recv_many(&mut batch, BATCH).await > 0 {
        let mut records = Vec::with_capacity(batch.len());
        let mut parts = Vec::new();
        for Write { job, confirm, what } in batch.drain(..) {
            match what {
                What::Record(record) => records.push((job, confirm, record)),
                What::Part(part) => parts.push((job, confirm, part)),
            }
        }
        // A body may look up the results of all its members.
        if !until_done(&*backend, records, &written).await || !until_done(&*backend, parts, &written).await {
            return;
        }
    }
}

type Answers = Vec<Result<Option<Counted>, BackendError>>;

/// One kind of what is written.
trait Writable: Clone + Send + Sync {
    fn write(backend: &dyn ResultBackend, work: &[Self]) -> impl Future<Output = Answers> + Send;
}

impl Writable for Record {
    async fn write(backend: &dyn ResultBackend, work: &[Self]) -> Answers {
        backend.store(work).await.into_iter().map(|answer| answer.map(|()| None)).collect()
    }
}

impl Writable for Part {
    async fn write(backend: &dyn ResultBackend, work: &[Self]) -> Answers {
        backend.count(work).await.into_iter().map(|answer| answer.map(Some)).collect()
    }
}

/// Does it all, and what could not be done again and again. False when nobody wants to hear of it any more.
async fn until_done<W: Writable>(
    backend: &dyn ResultBackend,
    mut work: Vec<(JobId, Option<StoreId>, W)>,
    written: &mpsc::UnboundedSender<Written>,
) -> bool {
    let mut failures = 0;
    while !work.is_empty() {
        let what: Vec<W> = work.iter().map(|(_, _, what)| what.clone()).collect();
        let answers = W::write(backend, &what).await;
        let mut left = Vec::new();
        let mut down = None;
        for ((job, confirm, what), answer) in work.into_iter().zip(answers) {
            let (error, counted) = match answer {
                Ok(counted) => (None, counted),
                Err(error) if error.is_retryable() => {
                    down = Some(error);
                    left.push((job, confirm, what));
                    continue;
                }
                Err(error) => (Some(error.to_string()), None),
            };
            if let Some(error) = &error {
                tracing::error!(target: "celery.worker", %error, "A result could not be stored.");
            }
            if written.send(Written { job, confirm, error, counted }).is_err() {
                return false;
            }
        }
        if let Some(error) = down {
            if failures == 0 {
                tracing::error!(target: "celery.worker", %error, waiting = left.len(), "Results cannot be stored; trying again.");
            }
            failures += 1;
            tokio::time::sleep(back_off(failures, FIRST_WAIT, LONGEST_WAIT)).await;
        } else if failures > 0 {
            tracing::info!(target: "celery.worker", attempts = failures, "Results are stored again.");
        }
        work = left;
    }
    true
}
