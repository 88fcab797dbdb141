//! Outcome and policy to what the broker is told. The only place that decides.

use super::hooks::Incident;
use crate::broker::Settlement;
use crate::config::TaskPolicy;
use crate::pool::Outcome;

/// Why the worker killed a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kill {
    /// `revoke(terminate=True)`, with this signal.
    Revoked(i32),
    /// A cold stop, or the loss of the broker connection where the app asks for it: the work is to be done again.
    Cancelled,
}

/// What is known of a job that ended.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// The broker has been told already (early ack).
    pub acknowledged: bool,
    /// The worker killed its child, for this reason.
    pub killed: Option<Kill>,
}

/// What follows from how a task ended.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What the broker is told; [`Verdict::incident`] may override it. Nothing when it was told before.
    pub settlement: Option<Settlement>,
    /// What the parent has to report first, because no child did.
    pub incident: Option<Incident>,
}

/// What the broker is told once a task has ended, and what the parent reports before. Nothing else decides it.
pub fn settle(policy: &TaskPolicy, outcome: &Outcome, ending: Ending) -> Verdict {
    let (settlement, incident) = match outcome {
        Outcome::Success { .. } | Outcome::Retry { .. } | Outcome::Ignored => (Settlement::Ack, None),
        // It comes as another message under the same tag; should anybody ask, it was not handled.
        Outcome::Translated { .. } => (Settlement::GiveBack, None),
        Outcome::Failure { .. } => (on_failure(policy), None),
        Outcome::Rejected { requeue: true, .. } => (Settlement::Requeue, None),
        Outcome::Rejected { requeue: false, exception, traceback } => (
            Settlement::Reject,
            Some(Incident::TaskRejected { exception: exception.clone(), traceback: traceback.clone() }),
        ),
        Outcome::Undecodable { reason } => {
            (Settlement::Ack, Some(Incident::Undecodable { reason: reason.clone() }))
        }
        Outcome::Malformed { reason } => {
            (Settlement::Reject, Some(Incident::Rejected { reason: reason.clone() }))
        }
        Outcome::WorkerLost { .. } | Outcome::TimedOut { .. } | Outcome::Terminated
            if ending.killed == Some(Kill::Cancelled) =>
        {
            // As in 5.7: a late-acked task goes back without a state, an early-acked one is lost and says so.
            if ending.acknowledged {
                (Settlement::Ack, Some(Incident::Cancelled))
            } else {
                (Settlement::GiveBack, None)
            }
        }
        Outcome::WorkerLost { .. } | Outcome::Terminated
            if matches!(ending.killed, Some(Kill::Revoked(_))) =>
        {
            // Announced when the signal was sent.
            (Settlement::Ack, None)
        }
        Outcome::WorkerLost { status } => {
            let requeue = policy.acks_late
                && policy.reject_on_worker_lost
                && !policy.retry_on_worker_lost
                && !ending.acknowledged;
            let settlement = if requeue { Settlement::Requeue } else { on_failure(policy) };
            (settlement, Some(Incident::WorkerLost { status: status.clone(), requeued: requeue }))
        }
        Outcome::TimedOut { limit } => {
            let requeue = policy.acks_late && !policy.acks_on_timeout && !ending.acknowledged;
            let settlement = if requeue { Settlement::Requeue } else { Settlement::Ack };
            (settlement, Some(Incident::TimedOut { limit: *limit, requeued: requeue }))
        }
        // A child was told to die by somebody else; as a lost worker.
        Outcome::Terminated => (
            on_failure(policy),
            Some(Incident::WorkerLost { status: "signal 15 (SIGTERM)".to_owned(), requeued: false }),
        ),
    };
    Verdict { settlement: (!ending.acknowledged).then_some(settlement), incident }
}

fn on_failure(policy: &TaskPolicy) -> Settlement {
    if !policy.acks_late || policy.acks_on_failure { Settlement::Ack } else { Settlement::Reject }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> Outcome {
        Outcome::Failure { exception: "E()".into(), traceback: String::new(), runtime: 0.0 }
    }

    fn lost() -> Outcome {
        Outcome::WorkerLost { status: "signal 9 (SIGKILL)".into() }
    }

    const UNACKED: Ending = Ending { acknowledged: false, killed: None };
    const ACKED: Ending = Ending { acknowledged: true, killed: None };

    /// The rows EXE-A of Celery 5.7 with late acks, and where we differ on purpose.
    #[test]
    fn every_row_of_the_acks_matrix_is_settled_as_celery_does() {
        let late = TaskPolicy {
            acks_late: true,
            acks_on_failure: true,
            acks_on_timeout: true,
            ..Default::default()
        };
        let unforgiving = TaskPolicy { acks_on_failure: false, acks_on_timeout: false, ..late.clone() };
        let requeues = TaskPolicy { reject_on_worker_lost: true, ..late.clone() };
        let retries = TaskPolicy { retry_on_worker_lost: true, ..requeues.clone() };
        let rejected =
            |requeue| Outcome::Rejected { requeue, exception: String::new(), traceback: String::new() };
        let timeout = Outcome::TimedOut { limit: 1.0 };
        let cancelled = Ending { acknowledged: false, killed: Some(Kill::Cancelled) };
        let revoked = Ending { acknowledged: false, killed: Some(Kill::Revoked(15)) };
        for (policy, outcome, ending, expected) in [
            (&late, &Outcome::Success { result: "1".into(), runtime: 0.0 }, UNACKED, Some(Settlement::Ack)),
            (&late, &Outcome::Ignored, UNACKED, Some(Settlement::Ack)),
            (&late, &failure(), UNACKED, Some(Settlement::Ack)),
            (&late, &failure(), ACKED, None),
            (&unforgiving, &failure(), UNACKED, Some(Settlement::Reject)),
            (&late, &timeout, UNACKED, Some(Settlement::Ack)),
            (&unforgiving, &timeout, UNACKED, Some(Settlement::Requeue)),
            (&late, &lost(), UNACKED, Some(Settlement::Ack)),
            (&unforgiving, &lost(), UNACKED, Some(Settlement::Reject)),
            (&requeues, &lost(), UNACKED, Some(Settlement::Requeue)),
            (&requeues, &lost(), ACKED, None),
            (&retries, &lost(), UNACKED, Some(Settlement::Ack)),
            (&late, &rejected(true), UNACKED, Some(Settlement::Requeue)),
            (&late, &rejected(false), UNACKED, Some(Settlement::Reject)),
            (&late, &rejected(true), ACKED, None),
            (&late, &Outcome::Terminated, cancelled, Some(Settlement::GiveBack)),
            (&late, &lost(), cancelled, Some(Settlement::GiveBack)),
            (&late, &Outcome::Terminated, revoked, Some(Settlement::Ack)),
            (&late, &Outcome::Undecodable { reason: String::new() }, UNACKED, Some(Settlement::Ack)),
            (&late, &Outcome::Malformed { reason: None }, UNACKED, Some(Settlement::Reject)),
        ] {
            let verdict = settle(policy, outcome, ending);
            assert_eq!(verdict.settlement, expected, "{outcome:?} {ending:?} {policy:?}");
        }
    }

    #[test]
    fn an_early_acked_task_that_fails_any_way_is_never_rejected() {
        let early = TaskPolicy { acks_on_failure: false, acks_on_timeout: false, ..Default::default() };
        for outcome in [failure(), lost(), Outcome::TimedOut { limit: 1.0 }] {
            assert_eq!(settle(&early, &outcome, UNACKED).settlement, Some(Settlement::Ack), "{outcome:?}");
        }
    }

    #[test]
    fn what_goes_back_to_its_queue_stores_no_failure() {
        let policy = TaskPolicy { acks_late: true, reject_on_worker_lost: true, ..Default::default() };
        assert!(matches!(
            settle(&policy, &lost(), UNACKED).incident,
            Some(Incident::WorkerLost { requeued: true, .. })
        ));
        assert!(matches!(
            settle(&policy, &lost(), ACKED).incident,
            Some(Incident::WorkerLost { requeued: false, .. })
        ));
    }

    #[test]
    fn an_early_acked_task_that_is_cancelled_says_that_it_is_lost() {
        let ending = Ending { acknowledged: true, killed: Some(Kill::Cancelled) };
        let verdict = settle(&TaskPolicy::default(), &Outcome::Terminated, ending);
        assert!(matches!(verdict.incident, Some(Incident::Cancelled)));
        assert_eq!(verdict.settlement, None);
    }
}
