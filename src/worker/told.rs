//! Which task events leave when: one table for what a child said, one for what the parent reported. Decides, does
//! nothing.

use serde::{Deserialize, Serialize};

use super::acks::Kill;
use super::hooks::Incident;
use crate::broker::Settlement;
use crate::pool::Outcome;
use crate::protocol::{TaskHeaders, repr};

/// A task event with the fields of its own. It serializes to them; the type is [`TaskEvent::kind`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum TaskEvent {
    /// The worker has the task.
    Received(Box<Received>),
    /// A child began it.
    Started {},
    /// It returned.
    Succeeded {
        /// Text of the result.
        result: String,
        /// Seconds; none where its child died with the number.
        runtime: Option<f64>,
    },
    /// It failed, or nobody knows it.
    Failed {
        /// `repr` of the exception.
        exception: String,
        /// Its traceback; none for a task that nobody knows.
        #[serde(skip_serializing_if = "Option::is_none")]
        traceback: Option<String>,
    },
    /// It comes again.
    Retried {
        /// `repr` of the exception.
        exception: String,
        /// Its traceback.
        traceback: String,
    },
    /// Its message was rejected.
    Rejected {
        /// Whether it goes back to its queue.
        requeue: bool,
    },
    /// It was revoked, or came too late.
    Revoked {
        /// Killed while it ran.
        terminated: bool,
        /// The signal that killed it.
        signum: Option<i32>,
        /// Past its `expires`.
        expired: bool,
    },
    /// The worker killed it, for a cold stop or because its connection was lost.
    Cancelled {},
}

/// The fields of `task-received`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Received {
    name: String,
    args: String,
    kwargs: String,
    root_id: Option<String>,
    parent_id: Option<String>,
    retries: i64,
    eta: Option<String>,
    expires: Option<String>,
}

impl TaskEvent {
    /// The type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Received(_) => "task-received",
            Self::Started {} => "task-started",
            Self::Succeeded { .. } => "task-succeeded",
            Self::Failed { .. } => "task-failed",
            Self::Retried { .. } => "task-retried",
            Self::Rejected { .. } => "task-rejected",
            Self::Revoked { .. } => "task-revoked",
            Self::Cancelled {} => "task-cancelled",
        }
    }

    /// That the worker has the task; the times as Python writes them.
    pub fn received(headers: &TaskHeaders, eta: Option<String>, expires: Option<String>) -> Self {
        Self::Received(Box::new(Received {
            name: headers.display_name().to_owned(),
            args: headers.argsrepr.clone().unwrap_or_default(),
            kwargs: headers.kwargsrepr.clone().unwrap_or_default(),
            root_id: headers.root_id.clone(),
            parent_id: headers.parent_id.clone(),
            retries: headers.retries.unwrap_or(0),
            eta,
            expires,
        }))
    }
}

/// What the program around the worker made of an [`Incident`].
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Account {
    /// Overrides how the message is settled.
    #[serde(default)]
    pub settlement: Option<Settlement>,
    /// What became of the task.
    #[serde(default)]
    pub became: Became,
}

/// What became of a task that no child accounts for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Became {
    /// Nothing that an event tells; or what the incident says by itself.
    #[default]
    Untold,
    /// A failure.
    Failed {
        /// `repr` of the exception.
        exception: String,
        /// Its traceback.
        traceback: String,
    },
    /// It was sent again.
    Retried {
        /// `repr` of the exception.
        exception: String,
        /// Its traceback.
        traceback: String,
    },
    /// It had succeeded before its child died.
    Succeeded {
        /// Text of the result.
        result: String,
    },
}

impl Became {
    fn event(&self) -> Option<TaskEvent> {
        Some(match self.clone() {
            Self::Untold => return None,
            Self::Failed { exception, traceback } => {
                TaskEvent::Failed { exception, traceback: Some(traceback) }
            }
            Self::Retried { exception, traceback } => TaskEvent::Retried { exception, traceback },
            Self::Succeeded { result } => TaskEvent::Succeeded { result, runtime: None },
        })
    }
}

/// What is told of a task once it has ended and its result is stored. What has an incident is told of by
/// [`of_incident`]. `settlement`: what the broker is told now, none when it was told before.
pub fn of_outcome(outcome: &Outcome, settlement: Option<Settlement>, killed: Option<Kill>) -> Vec<TaskEvent> {
    match outcome.clone() {
        Outcome::Success { result, runtime } => {
            vec![TaskEvent::Succeeded { result, runtime: Some(runtime) }]
        }
        Outcome::Failure { exception, traceback, .. } => {
            let failed = TaskEvent::Failed { exception, traceback: Some(traceback) };
            rejected(settlement).into_iter().chain([failed]).collect()
        }
        Outcome::Retry { exception, traceback } => vec![TaskEvent::Retried { exception, traceback }],
        Outcome::Rejected { requeue: true, .. } => rejected(settlement).into_iter().collect(),
        Outcome::WorkerLost { .. } | Outcome::TimedOut { .. } | Outcome::Terminated
            if killed == Some(Kill::Cancelled) && settlement == Some(Settlement::GiveBack) =>
        {
            vec![TaskEvent::Cancelled {}]
        }
        Outcome::WorkerLost { .. }
        | Outcome::TimedOut { .. }
        | Outcome::Terminated
        | Outcome::Rejected { requeue: false, .. }
        | Outcome::Ignored
        | Outcome::Undecodable { .. }
        | Outcome::Malformed { .. }
        | Outcome::Translated { .. } => Vec::new(),
    }
}

/// What is told of a task once the parent has accounted for it. `settlement`: what the broker is told, none when it was
/// told before.
pub fn of_incident(incident: &Incident, became: &Became, settlement: Option<Settlement>) -> Vec<TaskEvent> {
    match incident {
        Incident::Unknown { task } => {
            let exception = format!("NotRegistered({})", repr::repr(task));
            vec![TaskEvent::Failed { exception, traceback: None }]
        }
        Incident::Revoked { terminated, signal, expired, .. } => {
            let (terminated, signum, expired) = (*terminated, *signal, *expired);
            vec![TaskEvent::Revoked { terminated, signum, expired }]
        }
        // As in 5.7: the failure first, then the message.
        Incident::TaskRejected { .. } => became.event().into_iter().chain(rejected(settlement)).collect(),
        Incident::WorkerLost { .. } | Incident::TimedOut { .. } | Incident::Unsent { .. } => {
            rejected(settlement).into_iter().chain(became.event()).collect()
        }
        Incident::Cancelled => vec![TaskEvent::Cancelled {}],
        Incident::BadEta { .. } => vec![TaskEvent::Rejected { requeue: false }],
        Incident::Rejected { .. } | Incident::Undecodable { .. } => Vec::new(),
    }
}

/// Whether such an event leaves for tasks with `send_events` off: only that of a task that nobody knows.
pub fn leaves_always(incident: &Incident) -> bool {
    matches!(incident, Incident::Unknown { .. })
}

fn rejected(settlement: Option<Settlement>) -> Option<TaskEvent> {
    match settlement? {
        Settlement::Reject => Some(TaskEvent::Rejected { requeue: false }),
        Settlement::Requeue => Some(TaskEvent::Rejected { requeue: true }),
        Settlement::Ack | Settlement::GiveBack => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Settlement::{Ack, GiveBack, Reject, Requeue};

    fn shown(events: &[TaskEvent]) -> Vec<String> {
        events
            .iter()
            .map(|event| format!("{} {}", event.kind(), serde_json::to_string(event).unwrap()))
            .collect()
    }

    /// The rows EXE-E of Celery 5.7.
    #[test]
    fn every_outcome_of_a_child_is_told_as_celery_tells_it() {
        let text = || "E()".to_owned();
        let failure = Outcome::Failure { exception: text(), traceback: "T".into(), runtime: 1.0 };
        let rejects = |requeue| Outcome::Rejected { requeue, exception: text(), traceback: "T".into() };
        let failed = r#"task-failed {"exception":"E()","traceback":"T"}"#;
        let dropped = r#"task-rejected {"requeue":false}"#;
        let requeued = r#"task-rejected {"requeue":true}"#;
        for (outcome, settlement, killed, expected) in [
            (
                Outcome::Success { result: "3".into(), runtime: 0.5 },
                Some(Ack),
                None,
                &[r#"task-succeeded {"result":"3","runtime":0.5}"#][..],
            ),
            (failure.clone(), None, None, &[failed]),
            (failure.clone(), Some(Ack), None, &[failed]),
            (failure, Some(Reject), None, &[dropped, failed]),
            (
                Outcome::Retry { exception: text(), traceback: "T".into() },
                Some(Ack),
                None,
                &[r#"task-retried {"exception":"E()","traceback":"T"}"#],
            ),
            (Outcome::Ignored, Some(Ack), None, &[]),
            (rejects(true), Some(Requeue), None, &[requeued]),
            (rejects(true), None, None, &[]),
            (rejects(false), Some(Reject), None, &[]),
            (Outcome::Terminated, Some(GiveBack), Some(Kill::Cancelled), &["task-cancelled {}"]),
            (Outcome::Terminated, Some(Ack), Some(Kill::Revoked(15)), &[]),
            (Outcome::Undecodable { reason: text() }, Some(Ack), None, &[]),
        ] {
            assert_eq!(
                shown(&of_outcome(&outcome, settlement, killed)),
                expected,
                "{outcome:?} {settlement:?}"
            );
        }
    }

    #[test]
    fn what_the_parent_accounts_for_is_told_as_celery_tells_it() {
        let text = || "E()".to_owned();
        let failed = || Became::Failed { exception: text(), traceback: "T".into() };
        let lost = |requeued| Incident::WorkerLost { status: String::new(), requeued };
        let failure = r#"task-failed {"exception":"E()","traceback":"T"}"#;
        let dropped = r#"task-rejected {"requeue":false}"#;
        let requeued = r#"task-rejected {"requeue":true}"#;
        for (incident, became, settlement, expected) in [
            (
                Incident::Unknown { task: "x".into() },
                Became::Untold,
                Some(Reject),
                &[r#"task-failed {"exception":"NotRegistered('x')"}"#][..],
            ),
            (
                Incident::Revoked { reason: "terminated", terminated: true, signal: Some(9), expired: false },
                Became::Untold,
                None,
                &[r#"task-revoked {"terminated":true,"signum":9,"expired":false}"#],
            ),
            (
                Incident::Revoked { reason: "expired", terminated: false, signal: None, expired: true },
                Became::Untold,
                Some(Ack),
                &[r#"task-revoked {"terminated":false,"signum":null,"expired":true}"#],
            ),
            (lost(false), failed(), Some(Ack), &[failure]),
            (lost(false), failed(), Some(Reject), &[dropped, failure]),
            (lost(true), Became::Untold, Some(Requeue), &[requeued]),
            (
                lost(false),
                Became::Retried { exception: text(), traceback: "T".into() },
                Some(Ack),
                &[r#"task-retried {"exception":"E()","traceback":"T"}"#],
            ),
            (
                lost(false),
                Became::Succeeded { result: "3".into() },
                Some(Ack),
                &[r#"task-succeeded {"result":"3","runtime":null}"#],
            ),
            (Incident::TimedOut { limit: 1.0, requeued: false }, failed(), None, &[failure]),
            (Incident::TimedOut { limit: 1.0, requeued: true }, Became::Untold, Some(Requeue), &[requeued]),
            (
                Incident::TaskRejected { exception: text(), traceback: text() },
                failed(),
                Some(Reject),
                &[failure, dropped],
            ),
            (Incident::TaskRejected { exception: text(), traceback: text() }, failed(), None, &[failure]),
            (Incident::Unsent { reason: text() }, failed(), Some(Ack), &[failure]),
            (Incident::Cancelled, Became::Untold, None, &["task-cancelled {}"]),
            (Incident::BadEta { reason: text() }, Became::Untold, Some(Reject), &[dropped]),
            (Incident::Rejected { reason: None }, Became::Untold, Some(Reject), &[]),
            (Incident::Undecodable { reason: text() }, Became::Untold, Some(Ack), &[]),
        ] {
            assert_eq!(shown(&of_incident(&incident, &became, settlement)), expected, "{incident:?}");
        }
    }

    #[test]
    fn a_task_is_received_under_the_name_that_it_shows() {
        let headers = serde_json::from_value(serde_json::json!({
            "task": "t", "id": "1", "shadow": "other", "argsrepr": "(1,)", "root_id": "r", "retries": 2,
        }));
        let event = TaskEvent::received(&headers.unwrap(), Some("2026-11-22T09:51:26+00:00".into()), None);
        assert_eq!(
            shown(&[event]),
            [concat!(
                r#"task-received {"name":"other","args":"(1,)","kwargs":"","root_id":"r","parent_id":null,"retries":2,"#,
                r#""eta":"2026-11-22T09:51:26+00:00","expires":null}"#
            )]
        );
    }
}
