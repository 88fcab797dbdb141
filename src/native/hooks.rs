//! What a native app does where Celery's parent process does something: it stores and logs. It has no signals.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::results::{Owner, Results};
use crate::backend::{Record, ResultBackend};
use crate::error::back_off;
use crate::protocol::result::Exception;
use crate::protocol::{DeliveryInfo, Json, Kind, Message};
use crate::worker::hooks::{Hooks, Incident, LogRecord, Notice, Report, Unstarted};
use crate::worker::told::{self, Became};

/// How often a write is tried while the backend is away, and how long is waited in between.
const TRIES: u32 = 20;
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// The hooks of a native app.
pub(super) struct NativeHooks {
    /// Where results go, and how they are written.
    pub(super) backend: Option<(Arc<dyn ResultBackend>, Results)>,
    /// `ignore_result` of the tasks.
    pub(super) ignored: HashMap<String, bool>,
    /// Node name.
    pub(super) node: String,
}

#[async_trait]
impl Hooks for NativeHooks {
    fn notice(&self, notice: Notice) {
        match notice {
            Notice::Ready => tracing::info!(target: "celery.apps.worker", "{} ready.", self.node),
            Notice::ShuttingDown { how, .. } => {
                tracing::info!(target: "celery.worker", "worker: {how} shutdown ({})", self.node);
            }
            Notice::Say(text) => tracing::warn!(target: "celery.worker", "{}", text.trim()),
            Notice::Listening
            | Notice::Connected { .. }
            | Notice::Lost
            | Notice::Stopping { .. }
            | Notice::Children(_)
            | Notice::Heartbeat
            | Notice::Events { .. }
            | Notice::Neighbour { .. }
            | Notice::Revoked(_)
            | Notice::Over { .. }
            | Notice::Cry => {}
        }
    }

    fn log(&self, record: LogRecord) {
        // A target must be known when the program is built, so the logger is a field.
        let (logger, text) = (record.logger, record.message);
        match record.level {
            0..20 => tracing::debug!(target: "celery", logger, "{text}"),
            20..30 => tracing::info!(target: "celery", logger, "{text}"),
            30..40 => tracing::warn!(target: "celery", logger, "{text}"),
            40.. => tracing::error!(target: "celery", logger, "{text}"),
        }
    }

    fn wants_received(&self) -> bool {
        false
    }

    async fn received(&self, _message: &Message, _info: &DeliveryInfo) {}

    async fn report(&self, report: Report) -> told::Account {
        let account = account(&report.what);
        match account.level {
            Level::Quiet => {}
            Level::Warning => tracing::warn!(target: "celery.worker.consumer.consumer", "{}", account.line),
            Level::Error => tracing::error!(target: "celery.worker.consumer.consumer", "{}", account.line),
        }
        if let Some((state, exception)) = account.stored {
            self.store(&report, state, &exception).await;
            if state == "FAILURE" {
                let (exception, traceback) = (exception.repr(), exception.line());
                return told::Account { settlement: None, became: Became::Failed { exception, traceback } };
            }
        }
        told::Account::default()
    }

    async fn store_revoked(&self, tasks: Vec<Unstarted>) {
        for task in tasks {
            self.store_unstarted(&task.id).await;
        }
    }

    async fn control(&self, method: &str, _arguments: Value) -> Option<Value> {
        match method {
            "report" => Some(json!({"ok": format!("celeriac {}, native app", env!("CARGO_PKG_VERSION"))})),
            "conf" | "dump_conf" => Some(json!({})),
            _ => None,
        }
    }
}

impl NativeHooks {
    /// Stores REVOKED for a task that nobody has begun or ended yet, as far as the backend knows.
    async fn store_unstarted(&self, id: &str) {
        let Some((backend, results)) = &self.backend else { return };
        let status = match backend.get(id).await {
            Ok(document) => document.and_then(|document| {
                let document: Value = serde_json::from_slice(&document).ok()?;
                document.get("status")?.as_str().map(str::to_owned)
            }),
            Err(error) => {
                tracing::warn!(target: "celery.worker.control", %error, "Failed to mark task {id} as revoked.");
                return;
            }
        };
        if !matches!(status.as_deref(), None | Some("PENDING" | "RECEIVED" | "RETRY" | "REJECTED")) {
            return;
        }
        // All that is known of it is its id.
        let Ok(headers) = serde_json::from_value(json!({"task": "", "id": id})) else { return };
        let (properties, info) = (Json::empty(), DeliveryInfo::default());
        let owner = Owner { headers: &headers, properties: &properties, info: &info, arguments: None };
        let exception = Exception::new("celery.exceptions", "TaskRevokedError", "revoked");
        let bare = Results { extended: false, ..results.clone() };
        if let Some(record) = bare.raised(&owner, "REVOKED", &exception, None) {
            write(backend.as_ref(), record).await;
        }
    }

    async fn store(&self, report: &Report, state: &str, exception: &Exception) {
        let Some((backend, results)) = &self.backend else { return };
        let Kind::Task(headers) = report.message.kind() else { return };
        let by_task = self.ignored.get(&headers.task).copied().unwrap_or(false);
        if headers.ignore_result.unwrap_or(by_task) {
            return;
        }
        let owner = Owner {
            headers: &headers,
            properties: &report.message.properties,
            info: &report.info,
            arguments: None,
        };
        let line = exception.line();
        // As Celery: an exception that was never raised has no traceback.
        let traceback = (state == "FAILURE").then_some(line.as_str());
        if let Some(record) = results.raised(&owner, state, exception, traceback) {
            write(backend.as_ref(), record).await;
        }
    }
}

async fn write(backend: &dyn ResultBackend, record: Record) {
    for attempt in 1..=TRIES {
        let answer = backend.store(std::slice::from_ref(&record)).await.into_iter().next();
        match answer {
            Some(Err(error)) if error.is_retryable() && attempt < TRIES => {
                tokio::time::sleep(back_off(attempt, FIRST_WAIT, LONGEST_WAIT)).await;
            }
            Some(Err(error)) => {
                let task_id = record.task_id;
                tracing::error!(target: "celery.worker", task_id, %error, "A result could not be stored.");
                return;
            }
            Some(Ok(())) | None => return,
        }
    }
}

#[derive(Debug, PartialEq)]
enum Level {
    Quiet,
    Warning,
    Error,
}

/// What is logged and stored of an incident.
#[derive(Debug, PartialEq)]
struct Account {
    level: Level,
    line: String,
    stored: Option<(&'static str, Exception)>,
}

fn account(incident: &Incident) -> Account {
    let error = |line: String, stored| Account { level: Level::Error, line, stored };
    let failure = |exception: Exception| Some(("FAILURE", exception));
    match incident {
        Incident::Unknown { task } => error(
            format!("Received unregistered task of type '{task}'. The message was rejected."),
            failure(Exception::new("celery.exceptions", "NotRegistered", task.as_str())),
        ),
        Incident::Rejected { reason: None } => Account {
            level: Level::Warning,
            line: "Received and deleted unknown message.  Wrong destination?!?".to_owned(),
            stored: None,
        },
        Incident::Rejected { reason: Some(reason) } => {
            error(format!("Received invalid task message: {reason}. The message was rejected."), None)
        }
        Incident::Undecodable { reason } => error(format!("Can't decode message body: {reason}"), None),
        Incident::Revoked { reason, .. } => Account {
            level: Level::Quiet,
            line: String::new(),
            stored: Some(("REVOKED", Exception::new("celery.exceptions", "TaskRevokedError", *reason))),
        },
        Incident::WorkerLost { status, requeued } => {
            let lost = Exception::new(
                "billiard.exceptions",
                "WorkerLostError",
                format!("Worker exited prematurely: {status}."),
            );
            let line = format!("Task handler raised error: {}", lost.repr());
            error(line, if *requeued { None } else { failure(lost) })
        }
        Incident::TimedOut { limit, requeued } => {
            let late = Exception::new("billiard.exceptions", "TimeLimitExceeded", *limit);
            let line = format!("Task handler raised error: {}", late.repr());
            error(line, if *requeued { None } else { failure(late) })
        }
        Incident::TaskRejected { exception, .. } => error(
            format!("Task rejected: {exception}"),
            failure(Exception::new("celery.exceptions", "Reject", exception.as_str())),
        ),
        Incident::Unsent { reason } => error(
            format!("Task handler raised error: {reason}"),
            failure(Exception::new("kombu.exceptions", "OperationalError", reason.as_str())),
        ),
        Incident::Cancelled => {
            let arguments = vec!["Retry(Retry(...), None, None)".into(), Value::Null, Value::Null];
            let retry = Exception { kind: "Retry".into(), module: "celery.exceptions".into(), arguments };
            Account { level: Level::Quiet, line: String::new(), stored: Some(("RETRY", retry)) }
        }
        Incident::BadEta { reason } => error(
            format!("Couldn't convert ETA to timestamp: {reason}"),
            failure(Exception::new("builtins", "OverflowError", reason.as_str())),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parent_reports_is_stored_as_celery_stores_it() {
        for (incident, state, document) in [
            (
                Incident::Unknown { task: "t".into() },
                "FAILURE",
                r#"{"exc_type": "NotRegistered", "exc_message": ["t"], "exc_module": "celery.exceptions"}"#,
            ),
            (
                Incident::Revoked { reason: "expired", terminated: false, signal: None, expired: true },
                "REVOKED",
                r#"{"exc_type": "TaskRevokedError", "exc_message": ["expired"], "exc_module": "celery.exceptions"}"#,
            ),
            (
                Incident::TimedOut { limit: 2.5, requeued: false },
                "FAILURE",
                r#"{"exc_type": "TimeLimitExceeded", "exc_message": [2.5], "exc_module": "billiard.exceptions"}"#,
            ),
        ] {
            let (stored, exception) = account(&incident).stored.unwrap();
            assert_eq!((stored, exception.document().as_str()), (state, document));
        }
        for incident in [
            Incident::Rejected { reason: None },
            Incident::Undecodable { reason: "x".into() },
            Incident::TimedOut { limit: 1.0, requeued: true },
        ] {
            assert_eq!(account(&incident).stored, None);
        }
    }
}
