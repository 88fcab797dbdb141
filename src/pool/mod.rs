//! What a pool is: a number of slots that run one task each, and the events that tell how it went.
//!
//! A pool runs jobs and reports; it decides nothing about messages. A [`Slot`] is the right to run one
//! task; only an idle slot takes a job, so no task ever waits behind a long one.

pub mod ipc;
mod loops;
mod memory;
mod process;
pub mod processes;
mod slots;
#[cfg(test)]
mod tests;
mod wear;
pub mod zygote;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::backend::{Counted, Part, Record};
use crate::broker::Publication;
use crate::protocol::{DeliveryInfo, Json};

/// Names a job within one worker; never reused.
pub type JobId = u64;

/// A task handed to the pool: everything that a child needs to build `request` and run the tracer.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// Registered task name; empty where the body is to be translated (protocol 1).
    pub task: String,
    /// Task id.
    pub task_id: String,
    /// All message headers, as they came.
    pub headers: Json,
    /// All message properties.
    pub properties: Json,
    /// Where it came from.
    pub info: DeliveryInfo,
    /// The body, still serialized.
    pub body: Bytes,
    /// MIME type of the body.
    pub content_type: String,
    /// Encoding of the body.
    pub content_encoding: String,
    /// Whether the child says when it begins ([`Event::Accepted`]): the broker is told then, or monitors are.
    pub acks_early: bool,
    /// What the body is.
    pub work: Work,
    /// What a child need not look for in the headers.
    pub hints: Hints,
}

/// What the supervisor has read of the headers anyway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Whether the message asks for its result to be dropped, or to be kept.
    pub ignore_result: Option<bool>,
    /// It has a parent, or is a member of a group.
    pub related: bool,
    /// Its body is compressed.
    pub compressed: bool,
}

impl Hints {
    /// As it travels: python/celeriac/tracer.py reads it.
    pub fn bits(self) -> u8 {
        u8::from(self.ignore_result == Some(true))
            | u8::from(self.ignore_result == Some(false)) << 1
            | u8::from(self.related) << 2
            | u8::from(self.compressed) << 3
    }

    /// The other way round.
    pub fn of_bits(bits: u8) -> Self {
        let is = |bit: u8| bits & (1 << bit) != 0;
        Self { ignore_result: (is(0) || is(1)).then_some(is(0)), related: is(2), compressed: is(3) }
    }
}

/// What the body of a job is. The supervisor decides it; no message can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The body of a task message.
    Message,
    /// A pickled call that the parent process asks for (`celeriac.hosting`): always accepted before it runs, answered
    /// with [`Event::Answered`]. Only pools of Python processes run it.
    Call,
}

/// How a task ended, as data. Not an error of ours.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It returned.
    Success {
        /// Text of the result, as `task-succeeded` shows it.
        result: String,
        /// Seconds.
        runtime: f64,
    },
    /// It raised; the child has stored the failure and sent the errbacks.
    Failure {
        /// `repr` of the exception.
        exception: String,
        /// Its traceback.
        traceback: String,
        /// Seconds.
        runtime: f64,
    },
    /// It asked to be retried; the child has sent the new message.
    Retry {
        /// `repr` of the reason.
        exception: String,
        /// Its traceback.
        traceback: String,
    },
    /// It raised `Ignore`.
    Ignored,
    /// It raised `Reject`.
    Rejected {
        /// Whether the message goes back to its queue.
        requeue: bool,
        /// The reason: JSON from a Python child, plain text from a native task.
        exception: String,
        /// Its traceback.
        traceback: String,
    },
    /// The body could not be decoded; the task was never started nor accepted.
    Undecodable {
        /// What the decoder said.
        reason: String,
    },
    /// The body decoded to something that is no task (not three items, arguments of the wrong kind);
    /// never started nor accepted.
    Malformed {
        /// What is wrong with it; none when nothing in it looks like a task.
        reason: Option<String>,
    },
    /// It was a message of protocol 1 that only a child may decode. Never started nor accepted: it is to be judged
    /// as this message of protocol 2.
    Translated {
        /// The headers.
        headers: Json,
        /// The body.
        body: Bytes,
        /// MIME type of the body.
        content_type: String,
        /// Encoding of the body.
        content_encoding: String,
    },
    /// The child died under it.
    WorkerLost {
        /// As Celery words it: `signal 9 (SIGKILL)`, `exitcode 1`.
        status: String,
    },
    /// It passed its hard limit and its child was killed.
    TimedOut {
        /// The limit, seconds.
        limit: f64,
    },
    /// Its child was killed because the task was revoked with terminate, or cancelled at a cold stop.
    Terminated,
}

/// What a pool tells the worker.
#[derive(Debug)]
pub enum Event {
    /// A slot can take a job.
    Up {
        /// Which slot.
        slot: SlotId,
        /// Its process.
        pid: u32,
    },
    /// A slot that was held back after its job had ended can take another.
    Idle {
        /// Which slot.
        slot: SlotId,
    },
    /// A child has decoded a job and starts it. Only for jobs with `acks_early`; others are accepted by being
    /// sent, as only idle children are sent any.
    Accepted {
        /// Which job.
        job: JobId,
    },
    /// A [`Work::Call`] returned or raised; its [`Event::Ended`] follows.
    Answered {
        /// Which job.
        job: JobId,
        /// What it answered: pickled, and read by Python only.
        value: Bytes,
    },
    /// A result is to be written. When `confirm` is there the child waits: [`Pool::stored`] answers it.
    Store {
        /// The job whose child asks, 0 outside a job.
        job: JobId,
        /// What to write.
        record: Record,
        /// What to answer with.
        confirm: Option<StoreId>,
    },
    /// A member of a chord is to be counted, after the job's result is written. The child waits: [`Pool::counted`]
    /// answers it.
    Part {
        /// The job that is the member.
        job: JobId,
        /// What to count.
        part: Part,
        /// What to answer with; none when the child is gone.
        confirm: Option<StoreId>,
    },
    /// What continues a job is to be published, before its result is stored and its message settled.
    Publish {
        /// The job that is continued, 0 outside a job.
        job: JobId,
        /// The message and where it goes.
        publication: Box<Publication>,
        /// When it is there the child waits for the broker's word: [`Pool::stored`] gives it.
        confirm: Option<StoreId>,
    },
    /// A job ended; its slot is idle again unless the child is being replaced.
    Ended {
        /// Which job.
        job: JobId,
        /// How.
        outcome: Outcome,
    },
    /// A slot is gone (its child died, was recycled or shrunk away). A job that ran in it has had, or gets
    /// right after, its own `Ended`.
    Down {
        /// Which slot.
        slot: SlotId,
    },
    /// A child ended that nobody had told to go.
    Gone(Gone),
    /// The pool cannot go on (its children cannot be started); the worker must end with this message.
    Broken(String),
}

/// Why a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It had run its number of tasks.
    Tasks,
    /// A task left it above its memory limit.
    Memory,
    /// Killed for a task that passed its hard limit.
    TimeLimit,
    /// Killed for a task that was revoked with terminate, or cancelled at a cold stop.
    Terminated,
    /// By itself or by somebody else.
    Lost,
    /// Before it was up.
    Stillborn,
}

/// Names a slot of a pool. A replaced child has the slot of the one it replaces.
pub type SlotId = u32;

/// Names a store that a child waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreId {
    /// The slot that waits.
    pub slot: SlotId,
    /// The child's own number for it.
    pub serial: u64,
}

/// What interrupts a running job. On an event loop the job alone is cancelled, and its child killed only when the job
/// does not end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Interrupt {
    /// `SoftTimeLimitExceeded` is raised in the task.
    SoftLimit,
    /// The child is killed; the job ends as [`Outcome::TimedOut`].
    HardLimit(f64),
    /// The child is sent this signal (15 for TERM) and then killed; the job ends as [`Outcome::Terminated`].
    Terminate(i32),
}

/// A kind of pool.
pub trait Pool: Send {
    /// What `inspect stats` calls it: `prefork`, `threads`, `solo`, `gevent`, `eventlet`, `native`.
    fn name(&self) -> &'static str;

    /// Whether a job that runs can be ended, as terminate and a cold stop ask.
    fn interrupts(&self) -> bool;

    /// What is left of a job's limits, hard and soft: those that can be kept.
    fn limits(&self, limits: (Option<f64>, Option<f64>)) -> (Option<f64>, Option<f64>) {
        if self.interrupts() { limits } else { (None, None) }
    }

    /// How many slots there are when all children are up.
    fn capacity(&self) -> usize;

    /// How many slots can take a job now.
    fn idle(&self) -> usize;

    /// Processes, for `inspect stats`.
    fn pids(&self) -> Vec<u32>;

    /// Gives a job to an idle slot and says which, with its pid; gives it back when none is idle.
    ///
    /// # Errors
    /// The job, when no slot is idle.
    fn submit(&mut self, job: Job) -> Result<(SlotId, u32), Box<Job>>;

    /// How many slots of event loops there are when all children are up.
    fn loop_slots(&self) -> usize {
        0
    }

    /// How many of them can take a job now.
    fn idle_loops(&self) -> usize {
        0
    }

    /// Gives a job to the event loop that runs the fewest, and says which slot, with its pid.
    ///
    /// # Errors
    /// The job, when no slot of a loop is idle.
    fn submit_to_loop(&mut self, job: Job) -> Result<(SlotId, u32), Box<Job>> {
        Err(Box::new(job))
    }

    /// Interrupts a job. Unknown jobs (just ended) are ignored.
    fn interrupt(&mut self, job: JobId, how: Interrupt);

    /// Answers a child that waits for a store: `None` when it is written, else the error to raise there.
    fn stored(&mut self, store: StoreId, error: Option<String>);

    /// Answers a child that waits for a member of a chord to be counted.
    fn counted(&mut self, store: StoreId, counted: Counted) {
        let _ = (store, counted);
    }

    /// Adds slots.
    fn grow(&mut self, by: usize);

    /// Takes slots away, idle ones first.
    fn shrink(&mut self, by: usize);

    /// Replaces every child, after what it runs, by one that has loaded these modules.
    ///
    /// # Errors
    /// Why this pool cannot.
    fn restart(&mut self, reload: Reload) -> Result<(), String> {
        let _ = reload;
        Err(format!("the {} pool has no children to replace", self.name()))
    }

    /// Lets every child leave through its exit hooks, kills at the deadline those that have not left, and
    /// ends the zygote. Jobs still running are waited for until then. Events go on being sent meanwhile;
    /// the event channel closes when all is over.
    fn stop(&mut self, deadline: Instant);
}

/// What children are to load before they are forked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Names of Python modules.
    pub modules: Vec<String>,
    /// Whether those that are loaded already are loaded again.
    pub reload: bool,
}

/// A running pool and its events.
pub struct Running {
    /// The pool.
    pub pool: Box<dyn Pool>,
    /// Its events.
    pub events: mpsc::Receiver<Event>,
}

/// Events that may wait: a burst of outcomes from all children; a full channel slows children, not the supervisor.
pub const EVENT_CAPACITY: usize = 1024;

/// What the configuration says of the pool.
#[derive(Clone, Debug, Deserialize)]
pub struct PoolConfig {
    /// `prefork`, `threads`, `solo`, `gevent` or `eventlet`.
    pub kind: String,
    /// Number of slots.
    pub concurrency: u32,
    /// A child is replaced after so many tasks.
    #[serde(default)]
    pub max_tasks_per_child: Option<u32>,
    /// A child is replaced after the task in which it is found to have more than so many KiB for itself.
    #[serde(default)]
    pub max_memory_per_child: Option<u64>,
    /// A child that is not up after so many seconds is killed and replaced.
    pub proc_alive_timeout: f64,
    /// Number of children with an event loop; none where the app has no coroutine tasks.
    #[serde(default)]
    pub loops: u32,
    /// Tasks that run at a time on each of these loops.
    #[serde(default)]
    pub async_concurrency: u32,
}
