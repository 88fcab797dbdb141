//! [`Config`]: typed, checked, built once, then frozen. With Python it comes as JSON from
//! `python/celeriac/config.py`, which reads the app; a native app builds it with `Worker::builder()`.

use std::collections::HashMap;

use serde::Deserialize;

use crate::backend::BackendConfig;
use crate::broker::topology::Queue;
use crate::broker::{BrokerConfig, Control};
use crate::cluster::ClusterConfig;
use crate::cluster::events::EventsConfig;
use crate::error::Error;
use crate::logging::LineConfig;
use crate::pool::PoolConfig;

/// All that the worker is told before it starts.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Node name, `celery@host`.
    pub hostname: String,
    /// Broker.
    pub broker: BrokerConfig,
    /// Queues to consume, in order.
    pub queues: Vec<Queue>,
    /// Result backend.
    pub backend: BackendConfig,
    /// Pool.
    pub pool: PoolConfig,
    /// `--autoscale`; none: the pool has the size that it is told.
    #[serde(default)]
    pub autoscale: Option<AutoscaleConfig>,
    /// `worker_prefetch_multiplier`; 0: no bound.
    pub prefetch_multiplier: u32,
    /// `worker_disable_prefetch`.
    #[serde(default)]
    pub disable_prefetch: bool,
    /// `worker_eta_task_limit`.
    #[serde(default)]
    pub eta_task_limit: Option<u32>,
    /// Whether tasks are held back by their rate limits: not with `worker_disable_rate_limits`.
    #[serde(default = "yes")]
    pub rate_limits: bool,
    /// Ids that are revoked from the start, the oldest first.
    #[serde(default)]
    pub revoked: Vec<String>,
    /// Where the logical clock starts.
    #[serde(default)]
    pub clock: u64,
    /// Registered tasks.
    pub tasks: HashMap<String, TaskPolicy>,
    /// `accept_content` as MIME types.
    pub accept_content: Vec<String>,
    /// `timezone`, for times without an offset.
    pub timezone: String,
    /// Limits for tasks that have none of their own, seconds.
    #[serde(default)]
    pub time_limit: Option<f64>,
    /// The soft one.
    #[serde(default)]
    pub soft_time_limit: Option<f64>,
    /// Stopping.
    pub shutdown: ShutdownConfig,
    /// Remote control; none: off.
    #[serde(default)]
    pub control: Option<Control>,
    /// Whether boot steps of the app say something of themselves in `inspect stats`.
    #[serde(default)]
    pub app_has_stats: bool,
    /// Seconds between heartbeats; none: they are off.
    #[serde(default)]
    pub heartbeat: Option<f64>,
    /// Whether anybody listens to `heartbeat_sent`.
    #[serde(default)]
    pub heartbeat_signal: bool,
    /// Events; none: there are none.
    #[serde(default)]
    pub events: Option<EventsConfig>,
    /// Mingle and gossip.
    #[serde(default)]
    pub cluster: ClusterConfig,
    /// How the lines of received tasks are written without Python; none: through its logging.
    #[serde(default)]
    pub lines: Option<LineConfig>,
    /// Whether lines say what task they are about, as JSON ones do.
    #[serde(default)]
    pub log_tasks: bool,
    /// Where probes and metrics are served; none: nowhere.
    #[serde(default)]
    pub http: Option<String>,
    /// The ladder for the metrics: concerns and their rungs.
    #[serde(default)]
    pub rungs: Vec<(String, String)>,
    /// The same: rungs and how many registered tasks are on each.
    #[serde(default)]
    pub rung_tasks: Vec<(String, u64)>,
    /// Whether INFO lines are wanted at all, so that none are built in vain.
    #[serde(default)]
    pub log_info: bool,
    /// The same for DEBUG.
    #[serde(default)]
    pub log_debug: bool,
}

/// `--autoscale`.
#[derive(Clone, Debug, Deserialize)]
pub struct AutoscaleConfig {
    /// Most processes.
    pub max: u32,
    /// Fewest; what the pool starts with.
    pub min: u32,
    /// `AUTOSCALE_KEEPALIVE`: seconds without work before it shrinks.
    pub keepalive: f64,
}

/// What a task's attributes say about settling and limits.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct TaskPolicy {
    /// `acks_late`.
    #[serde(default)]
    pub acks_late: bool,
    /// `acks_on_failure`, resolved.
    #[serde(default = "yes")]
    pub acks_on_failure: bool,
    /// `acks_on_timeout`, resolved.
    #[serde(default = "yes")]
    pub acks_on_timeout: bool,
    /// `reject_on_worker_lost`.
    #[serde(default)]
    pub reject_on_worker_lost: bool,
    /// `retry_on_worker_lost`.
    #[serde(default)]
    pub retry_on_worker_lost: bool,
    /// `time_limit`, seconds.
    #[serde(default)]
    pub time_limit: Option<f64>,
    /// `soft_time_limit`, seconds.
    #[serde(default)]
    pub soft_time_limit: Option<f64>,
    /// `rate_limit`: tasks a second.
    #[serde(default)]
    pub rate_limit: Option<f64>,
    /// The same as the app wrote it: `10/m`.
    #[serde(default)]
    pub rate_limit_text: Option<String>,
    /// `ignore_result`.
    #[serde(default)]
    pub ignore_result: bool,
    /// `send_events`: whether its events are sent where task events are.
    #[serde(default = "yes")]
    pub send_events: bool,
    /// Whose objects its requests go through.
    #[serde(default)]
    pub hosting: Hosting,
    /// Its function is a coroutine function: it runs on an event loop.
    #[serde(default)]
    pub asynchronous: bool,
}

/// Whether a task's requests go through objects of the app's own in the parent process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hosting {
    /// No: nothing of the app's is called for them.
    #[default]
    Native,
    /// `Task.Request` is the app's: it is made when the message comes, and puts itself into the pool.
    Request,
    /// `Task.Strategy` is the app's: it is given the message and decides all that follows.
    Strategy,
}

impl Default for TaskPolicy {
    /// As a task that says nothing.
    fn default() -> Self {
        Self {
            acks_late: false,
            acks_on_failure: true,
            acks_on_timeout: true,
            reject_on_worker_lost: false,
            retry_on_worker_lost: false,
            time_limit: None,
            soft_time_limit: None,
            rate_limit: None,
            rate_limit_text: None,
            ignore_result: false,
            send_events: true,
            hosting: Hosting::Native,
            asynchronous: false,
        }
    }
}

/// Stopping.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ShutdownConfig {
    /// `worker_soft_shutdown_timeout`, seconds.
    #[serde(default)]
    pub soft_timeout: f64,
    /// `worker_enable_soft_shutdown_on_idle`.
    #[serde(default)]
    pub soft_on_idle: bool,
    /// `REMAP_SIGTERM=SIGQUIT`.
    #[serde(default)]
    pub term_is_quit: bool,
    /// SIGHUP restarts: only where stdout is no terminal.
    #[serde(default)]
    pub hup_restarts: bool,
    /// `worker_cancel_long_running_tasks_on_connection_loss`.
    #[serde(default)]
    pub cancel_on_connection_loss: bool,
}

impl ShutdownConfig {
    /// The signal that ends a task: TERM, or QUIT where children ignore TERM because it is remapped.
    pub fn terminate_signal(&self) -> i32 {
        if self.term_is_quit { 3 } else { 15 }
    }
}

fn yes() -> bool {
    true
}

impl Config {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`Error::Config`] names the field.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let config: Self =
            serde_json::from_str(text).map_err(|error| Error::Config(format!("configuration: {error}")))?;
        if config.broker.urls.is_empty() {
            return Err(Error::Config("broker_url is empty: there is no broker to consume from".to_owned()));
        }
        Ok(config)
    }

    /// How many deliveries may be unsettled before any waits for its `eta`; 0: no bound.
    pub fn prefetch(&self) -> u32 {
        let most = self.autoscale.as_ref().map_or(self.pool.concurrency, |autoscale| autoscale.max);
        self.prefetch_multiplier.saturating_mul(most.max(1))
    }
}
