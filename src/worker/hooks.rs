//! What the worker asks of the program around it: the app's signal handlers, Celery's own code for the rare
//! failures that the parent reports, logging. With Python this runs on the main thread (src/python/hooks.rs);
//! a native app has its own. Nothing on the path of a healthy task waits here unless a handler is connected.

use async_trait::async_trait;
use futures_util::future::{BoxFuture, ready};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::hosting::{Hosted, Order};
use super::told::Account;
use crate::broker::Settlement;
use crate::protocol::{DeliveryInfo, Message, TaskHeaders};

/// A moment of the worker's life. Sent in order; most are not waited for.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "what", content = "fields", rename_all = "snake_case")]
pub enum Notice {
    /// Signals of the process reach the worker from here on.
    Listening,
    /// Connected; `Connected to …` is logged and `worker.consumer.connection` is there.
    Connected {
        /// Masked address.
        address: String,
    },
    /// The connection is gone; [`Notice::Connected`] tells of the next.
    Lost,
    /// Consuming for the first time: `worker_ready`.
    Ready,
    /// A stop was asked for: `worker_shutting_down`.
    ShuttingDown {
        /// `SIGTERM`, …
        signal: String,
        /// `Warm` or `Cold`.
        how: &'static str,
        /// The exit status it leads to.
        exit_code: i32,
    },
    /// Nothing more is fetched: what consumes or schedules on the app's behalf is to end before the running tasks do.
    Stopping {
        /// Whether steps are terminated rather than stopped: the stop began as a cold one.
        terminate: bool,
    },
    /// A text for the terminal, past logging, as Celery prints on signals.
    Say(String),
    /// The processes of the pool changed; these are there now.
    Children(Vec<u32>),
    /// These ids were revoked, or expired: what a state file is to remember.
    Revoked(Vec<String>),
    /// The loop is over; the logical clock stands here.
    Over {
        /// Its value.
        clock: u64,
    },
    /// A heartbeat: `heartbeat_sent`.
    Heartbeat,
    /// A neighbour.
    Neighbour {
        /// The event by which it joined or left, or the last one before it fell silent.
        event: Value,
        /// It has fallen silent.
        missed: bool,
    },
    /// Remote control has switched the events of tasks.
    Events {
        /// On, or off.
        tasks: bool,
    },
    /// SIGUSR1: stack traces of all threads to stderr.
    Cry,
}

/// A message that the parent must account for itself, because no child will.
#[derive(Clone, Debug)]
pub struct Report {
    /// What happened.
    pub what: Incident,
    /// The message.
    pub message: Message,
    /// Where it came from.
    pub info: DeliveryInfo,
    /// Process that ran it, if one did.
    pub pid: Option<u32>,
}

/// What the parent reports.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Incident {
    /// No such task: FAILURE NotRegistered, `task_unknown`.
    Unknown {
        /// The name asked for.
        task: String,
    },
    /// Settled unread: `task_rejected`.
    Rejected {
        /// Why; none for `Wrong destination?!?`.
        reason: Option<String>,
    },
    /// The body could not be decoded: a log line and nothing else.
    Undecodable {
        /// What the decoder said.
        reason: String,
    },
    /// Revoked, expired or terminated: REVOKED, `task_revoked`.
    Revoked {
        /// `revoked`, `expired` or `terminated`.
        reason: &'static str,
        /// Killed while it ran.
        terminated: bool,
        /// The signal that killed it.
        signal: Option<i32>,
        /// Past its `expires`.
        expired: bool,
    },
    /// The child died: FAILURE WorkerLostError, or a retry where `retry_on_worker_lost` says so.
    WorkerLost {
        /// `signal 9 (SIGKILL)`.
        status: String,
        /// The message goes back to its queue: nothing is stored.
        requeued: bool,
    },
    /// The hard limit: FAILURE TimeLimitExceeded, errbacks and signal once.
    TimedOut {
        /// Seconds.
        limit: f64,
        /// The message goes back to its queue.
        requeued: bool,
    },
    /// `Reject(requeue=False)`: FAILURE, `task_failure`.
    TaskRejected {
        /// Text of the reason.
        exception: String,
        /// Its traceback.
        traceback: String,
    },
    /// The broker refused what follows the task: FAILURE OperationalError, errbacks, `task_failure`.
    Unsent {
        /// What the broker said.
        reason: String,
    },
    /// Cancelled at a cold stop after it was acknowledged: RETRY, `task_retry`.
    Cancelled,
    /// An `eta` that parses and lies outside of all time: FAILURE.
    BadEta {
        /// The reason.
        reason: String,
    },
}

/// The program around the worker.
#[async_trait]
pub trait Hooks: Send + Sync {
    /// Something happened.
    fn notice(&self, notice: Notice);

    /// Writes a log record with the data that custom handlers read. Batched by the implementation.
    fn log(&self, record: LogRecord);

    /// Whether [`Hooks::received`] has anybody to tell.
    fn wants_received(&self) -> bool;

    /// `task_received`; the task is not started before this returns.
    async fn received(&self, message: &Message, info: &DeliveryInfo);

    /// Does what Celery's parent process does: stores, signals, errbacks, log lines. The message is settled after.
    /// The answer says what became of the task, and may override the planned settlement: a task whose child died may
    /// turn out to have been retried (`retry_on_worker_lost`) or to have stored its SUCCESS, and is then acknowledged.
    async fn report(&self, report: Report) -> Account;

    /// Stores REVOKED for tasks that no child of this worker runs, unless their stored state says that they were begun
    /// or have ended. Celery does so since 5.6.2, before it answers.
    async fn store_revoked(&self, tasks: Vec<Unstarted>);

    /// A remote control command that is not ours: the app's own. `None`: no such command. A reply that is JSON only for
    /// Python, which writes `Infinity`, comes as its text; others may.
    async fn control(&self, method: &str, arguments: Value) -> Option<Value>;

    /// Tells the app's own `Request` and `Strategy` objects, in the order of the calls. The future ends when they have
    /// done what they do about it; with a settlement when they cannot make anything of the message.
    fn host(&self, _event: Hosted) -> BoxFuture<'static, Option<Settlement>> {
        Box::pin(ready(None))
    }

    /// What those objects ask for; asked once.
    fn orders(&self) -> mpsc::UnboundedReceiver<Order> {
        mpsc::unbounded_channel().1
    }
}

/// A revoked task that no child of this worker runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unstarted {
    /// Its id.
    pub id: String,
    /// Its name, where the worker holds it.
    pub task: Option<String>,
}

/// A line of the log, with logger name and level as Python's.
#[derive(Clone, Debug)]
pub struct LogRecord {
    /// Logger.
    pub logger: &'static str,
    /// 10 DEBUG … 50 CRITICAL.
    pub level: u8,
    /// The text.
    pub message: String,
    /// `record.data`.
    pub data: Option<Value>,
    /// What task it is about, where lines say that.
    pub task: Option<Box<About>>,
}

/// What task a log record is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct About {
    /// Registered name.
    pub task: String,
    /// Task id.
    pub id: String,
    /// Id of the first task of the workflow.
    pub root_id: Option<String>,
    /// Id of the task that sent it.
    pub parent_id: Option<String>,
    /// The trace that it belongs to, as the W3C writes it.
    pub traceparent: Option<String>,
}

impl About {
    /// That of a message.
    pub fn of(headers: &TaskHeaders) -> Self {
        Self {
            task: headers.task.clone(),
            id: headers.id.clone(),
            root_id: headers.root_id.clone(),
            parent_id: headers.parent_id.clone(),
            traceparent: headers.traceparent.as_ref().and_then(Value::as_str).map(str::to_owned),
        }
    }
}
