//! Writes results in batches, and again until the backend has them: an outage costs no finished work.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::backend::{Record, ResultBackend};
use crate::error::back_off;
use crate::pool::{JobId, StoreId};

/// A result to be written, and who wants to know.
#[derive(Debug)]
pub(super) struct Write {
    /// Whose result; the job is not settled before it is written.
    pub job: JobId,
    /// The child that waits for it, if one does.
    pub confirm: Option<StoreId>,
    /// What to write.
    pub record: Record,
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
        let mut attempt = 0;
        let mut records: Vec<Record> = batch.iter().map(|write| write.record.clone()).collect();
        while !batch.is_empty() {
            let answers = backend.store(&records).await;
            let mut left = Vec::new();
            let mut down = None;
            for (write, answer) in batch.drain(..).zip(answers) {
                match answer {
                    Err(error) if error.is_retryable() => {
                        down = Some(error);
                        left.push(write);
                    }
                    answer => {
                        let error = answer.err().map(|error| error.to_string());
                        if let Some(error) = &error {
                            tracing::error!(target: "celery.worker", task_id = write.record.task_id, %error, "A result could not be stored.");
                        }
                        let told = Written { job: write.job, confirm: write.confirm, error };
                        if written.send(told).is_err() {
                            return;
                        }
                    }
                }
            }
            if let Some(error) = down {
                if attempt == 0 {
                    tracing::error!(target: "celery.worker", %error, waiting = left.len(), "Results cannot be stored; trying again.");
                }
                attempt += 1;
                tokio::time::sleep(back_off(attempt, FIRST_WAIT, LONGEST_WAIT)).await;
            } else if attempt > 0 {
                tracing::info!(target: "celery.worker", attempts = attempt, "Results are stored again.");
            }
            records = left.iter().map(|write: &Write| write.record.clone()).collect();
            batch = left;
        }
    }
}
