//! What remote control sees of a worker, and what it may do to it.

use serde_json::Value;

use crate::broker::topology::Queue;
use crate::cluster::clock::LamportClock;
use crate::protocol::{DeliveryInfo, Message, TaskHeaders};
use crate::worker::hooks::Unstarted;
use crate::worker::revoked::RevokedTasks;

use super::Stats;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A child runs it.
    Active,
    /// It waits for a slot.
    Reserved,
    /// It waits for its `eta` or for its turn under a rate limit.
    Scheduled,
}

/// A request that the worker holds.
#[derive(Clone, Debug)]
pub struct Request<'w> {
    /// Its headers.
    pub headers: &'w TaskHeaders,
    /// The message, unless only the broker has it (a parked `eta`).
    pub message: Option<&'w Message>,
    /// Where it came from.
    pub info: &'w DeliveryInfo,
    /// Where it is.
    pub stage: Stage,
    /// When it was started, seconds since the epoch.
    pub time_start: Option<f64>,
    /// Whether the broker has been told.
    pub acknowledged: bool,
    /// The process that runs it.
    pub worker_pid: Option<u32>,
}

/// A worker under remote control. Nothing here waits: what takes time is begun.
pub trait Panel {
    /// Node name.
    fn node(&self) -> &str;

    /// The logical clock.
    fn clock(&mut self) -> &mut LamportClock;

    /// What is revoked.
    fn revoked(&mut self) -> &mut RevokedTasks;

    /// Revokes ids, here and for the workers to come.
    fn revoke(&mut self, ids: &[String]);

    /// All requests that the worker holds.
    fn requests(&self) -> Vec<Request<'_>>;

    /// The queues that are consumed.
    fn queues(&self) -> Vec<Queue>;

    /// Figures.
    fn stats(&self) -> Stats;

    /// Whether the app has figures of its own to add to them.
    fn app_has_stats(&self) -> bool {
        false
    }

    /// Names of the registered tasks, with their rate limit as the app or the last command wrote it.
    fn tasks(&self) -> Vec<(String, Option<String>)>;

    /// The signal that ends a task when none is named: TERM, or QUIT where TERM is remapped.
    fn default_signal(&self) -> i32;

    /// Tasks were revoked that no child of this worker runs: those whose stored state is still open (none, PENDING,
    /// RECEIVED, RETRY, REJECTED) are to be stored as REVOKED. The reply waits for it.
    fn store_revoked(&mut self, tasks: Vec<Unstarted>);

    /// Ends the request with this signal: a running one now; another is discarded when its turn comes.
    ///
    /// # Errors
    /// The `repr` of the exception to report, where the pool cannot end a task.
    fn terminate(&mut self, id: &str, signal: i32) -> Result<(), String>;

    /// Sets a task's rate limit, tasks a second; `None`: no limit. `text` is the limit as it was given. `false`: no
    /// such task.
    fn rate_limit(&mut self, task: &str, rate: Option<f64>, text: Option<&str>) -> bool;

    /// Sets a task's limits in seconds. `false`: no such task.
    fn time_limit(&mut self, task: &str, soft: Option<f64>, hard: Option<f64>) -> bool;

    /// Stops consuming a queue, named or called so.
    fn cancel_consumer(&mut self, queue: &str);

    /// Whether the size of the pool follows the tasks.
    fn autoscales(&self) -> bool;

    /// Changes most and fewest processes; what they then are, where the pool autoscales.
    fn autoscale(&mut self, max: Option<u32>, min: Option<u32>) -> Option<(usize, usize)>;

    /// Adds slots, and prefetch for them.
    ///
    /// # Errors
    /// The `repr` of the exception to report.
    fn grow(&mut self, by: usize) -> Result<(), String>;

    /// Takes slots away, and their prefetch.
    ///
    /// # Errors
    /// The `repr` of the exception to report.
    fn shrink(&mut self, by: usize) -> Result<(), String>;

    /// Sends events of tasks from now on. `false`: they are sent already. `None`: this worker has no events.
    fn enable_events(&mut self) -> Option<bool>;

    /// Sends no events of tasks from now on. `false`: nothing changes. `None`: this worker has no events.
    fn disable_events(&mut self) -> Option<bool>;

    /// Sends a heartbeat at once.
    fn send_heartbeat(&mut self);

    /// Calls an election.
    fn elect(&mut self, id: &str, topic: &str, action: Value);

    /// Stops the worker warmly.
    fn shutdown(&mut self);
}
