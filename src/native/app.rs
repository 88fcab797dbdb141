//! The registry of tasks, and the builder that makes a worker of it.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::extract::States;
use super::handler::Handler;
use super::hooks::NativeHooks;
use super::pool::{self, App, Run, Task};
use super::results::Results;
use crate::backend::ResultBackend;
use crate::broker::Broker;
use crate::broker::topology::Queue;
use crate::config::{Config, TaskPolicy};
use crate::error::{Error, mask};
use crate::worker::{self, Exit, Parts};
use crate::{backend, broker};

/// A worker of native tasks. [`Worker::builder`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Worker;

impl Worker {
    /// Begins a worker.
    pub fn builder() -> WorkerBuilder {
        WorkerBuilder::default()
    }
}

/// What a Python task's options of the same names say.
///
/// ```
/// use std::time::Duration;
/// use celeriac::native::TaskOptions;
///
/// let options = TaskOptions::new().acks_late().time_limit(Duration::from_secs(30));
/// ```
#[derive(Clone, Debug)]
pub struct TaskOptions(TaskPolicy);

impl Default for TaskOptions {
    fn default() -> Self {
        Self(TaskPolicy { acks_on_failure: true, acks_on_timeout: true, ..TaskPolicy::default() })
    }
}

impl TaskOptions {
    /// Celery's defaults: acknowledged when it starts, no limits, the result is stored.
    pub fn new() -> Self {
        Self::default()
    }

    /// Acknowledged when it is done: a task that was cut short runs again.
    pub fn acks_late(mut self) -> Self {
        self.0.acks_late = true;
        self
    }

    /// The handler is dropped after this time, and the task recorded as `TimeLimitExceeded`.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.0.time_limit = Some(limit.as_secs_f64());
        self
    }

    /// The handler is dropped after this time, and the task recorded as `SoftTimeLimitExceeded`.
    pub fn soft_time_limit(mut self, limit: Duration) -> Self {
        self.0.soft_time_limit = Some(limit.as_secs_f64());
        self
    }

    /// At most so many a second are started by this worker.
    pub fn rate_limit(mut self, per_second: f64) -> Self {
        self.0.rate_limit = Some(per_second);
        self.0.rate_limit_text = Some(format!("{per_second}/s"));
        self
    }

    /// No events are sent for this task.
    pub fn without_events(mut self) -> Self {
        self.0.send_events = false;
        self
    }

    /// The result is not stored, unless the message asks for it.
    pub fn ignore_result(mut self) -> Self {
        self.0.ignore_result = true;
        self
    }

    fn check(&self, name: &str) -> Result<(), Error> {
        let limits = [("time_limit", self.0.time_limit), ("soft_time_limit", self.0.soft_time_limit)];
        for (limit, seconds) in limits {
            if seconds.is_some_and(|seconds| seconds <= 0.0) {
                return Err(Error::Config(format!("task {name:?}: {limit} must be longer than zero")));
            }
        }
        if let (Some(soft), Some(hard)) = (self.0.soft_time_limit, self.0.time_limit)
            && soft > hard
        {
            return Err(Error::Config(format!("task {name:?}: soft_time_limit must not exceed time_limit")));
        }
        match self.0.rate_limit {
            Some(rate) if !(rate > 0.0 && rate.is_finite()) => Err(Error::Config(format!(
                "task {name:?}: rate_limit must be a number above zero, not {rate}"
            ))),
            _ => Ok(()),
        }
    }
}

type CheckState = Box<dyn Fn(&States) -> Result<(), String> + Send>;

struct Registered {
    name: String,
    run: Run,
    check: CheckState,
    options: TaskOptions,
}

/// Collects what a worker needs; [`WorkerBuilder::run`] checks it and runs the worker.
pub struct WorkerBuilder {
    brokers: Vec<String>,
    backend: Option<String>,
    queues: Vec<String>,
    tasks: Vec<Registered>,
    states: States,
    doubled_state: Option<&'static str>,
    concurrency: u32,
    prefetch_multiplier: u32,
    hostname: Option<String>,
    http: Option<String>,
    accept: Vec<String>,
    timezone: String,
    result_expires: Option<Duration>,
    result_extended: bool,
    task_events: bool,
    stop: CancellationToken,
    signals: bool,
}

impl Default for WorkerBuilder {
    fn default() -> Self {
        Self {
            brokers: Vec::new(),
            backend: None,
            queues: Vec::new(),
            tasks: Vec::new(),
            states: States::default(),
            doubled_state: None,
            concurrency: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            prefetch_multiplier: 4,
            hostname: None,
            http: None,
            accept: vec!["json".to_owned()],
            timezone: "UTC".to_owned(),
            result_expires: Some(Duration::from_secs(24 * 3600)),
            result_extended: false,
            task_events: false,
            stop: CancellationToken::new(),
            signals: true,
        }
    }
}

impl WorkerBuilder {
    /// Address of the broker, `broker_url`. Called again, or with a `;` between addresses: the failover list.
    pub fn broker(mut self, url: impl Into<String>) -> Self {
        self.brokers.extend(url.into().split(';').map(str::to_owned));
        self
    }

    /// Address of the result backend, `result_backend`. Without one no results are stored.
    pub fn backend(mut self, url: impl Into<String>) -> Self {
        self.backend = Some(url.into());
        self
    }

    /// Registers a task under the name that producers call it by.
    pub fn task<M: 'static>(self, name: impl Into<String>, handler: impl Handler<M>) -> Self {
        self.task_with(name, TaskOptions::default(), handler)
    }

    /// Registers a task with options.
    pub fn task_with<M: 'static>(
        mut self,
        name: impl Into<String>,
        options: TaskOptions,
        handler: impl Handler<M>,
    ) -> Self {
        let handler = Arc::new(handler);
        let checked = handler.clone();
        self.tasks.push(Registered {
            name: name.into(),
            run: Box::new(move |call| handler.call(call)),
            check: Box::new(move |states| checked.check(states).map_err(|rejection| rejection.to_string())),
            options,
        });
        self
    }

    /// A value that handlers take as [`super::State`], one a type. It is cloned for each call: put what is shared into
    /// an [`Arc`].
    pub fn state<T: Any + Clone + Send + Sync>(mut self, value: T) -> Self {
        if !self.states.insert(value) {
            self.doubled_state = Some(std::any::type_name::<T>());
        }
        self
    }

    /// A queue to consume; called again: one more. Without any: `celery`.
    pub fn queue(mut self, name: impl Into<String>) -> Self {
        self.queues.push(name.into());
        self
    }

    /// How many tasks run at once; by default as many as there are processors.
    pub fn concurrency(mut self, slots: u32) -> Self {
        self.concurrency = slots;
        self
    }

    /// How many messages are taken ahead for each slot, 4 by default; 0: no bound.
    pub fn prefetch_multiplier(mut self, messages: u32) -> Self {
        self.prefetch_multiplier = messages;
        self
    }

    /// Name of the node; by default `celery@` and the name of the machine.
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Serves `/livez`, `/readyz` and `/metrics` at `host:port`, or at `:port` for every address of the machine.
    pub fn http(mut self, address: impl Into<String>) -> Self {
        self.http = Some(address.into());
        self
    }

    /// Serializers whose messages are read: `json` (the default) and `pickle`. A pickle is read as plain data and runs no
    /// code, but nothing bounds what it makes of memory: accept it from senders that are trusted.
    pub fn accept_content<S: Into<String>>(mut self, serializers: impl IntoIterator<Item = S>) -> Self {
        self.accept = serializers.into_iter().map(Into::into).collect();
        self
    }

    /// Timezone of `date_done`, and of an `eta` without offset; UTC by default.
    pub fn timezone(mut self, name: impl Into<String>) -> Self {
        self.timezone = name.into();
        self
    }

    /// How long results are kept, a day by default; `None`: for ever.
    pub fn result_expires(mut self, after: Option<Duration>) -> Self {
        self.result_expires = after;
        self
    }

    /// Results tell name, arguments, worker, retries and queue of their task too.
    pub fn result_extended(mut self, extended: bool) -> Self {
        self.result_extended = extended;
        self
    }

    /// Sends events of tasks for monitors, as `-E` does; else remote control (`enable_events`) asks for them.
    pub fn task_events(mut self, send: bool) -> Self {
        self.task_events = send;
        self
    }

    /// Cancelling the token stops the worker as TERM does: what runs is finished.
    pub fn stop_with(mut self, token: CancellationToken) -> Self {
        self.stop = token;
        self
    }

    /// Whether the worker takes the process's signals (TERM, INT, QUIT, HUP), as it does by default.
    pub fn handle_signals(mut self, handle: bool) -> Self {
        self.signals = handle;
        self
    }

    /// Checks everything and runs the worker until it is stopped.
    ///
    /// # Errors
    /// [`Error::Config`] names what is wrong or missing. A worker that ran and broke says so in [`Exit::broken`].
    pub async fn run(self) -> Result<Exit, Error> {
        let (config, parts) = self.build()?;
        worker::run(config, parts).await
    }

    fn build(self) -> Result<(Config, Parts), Error> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.brokers.is_empty() {
            return wrong("no broker: call `.broker(\"redis://…\")` or `.broker(\"amqp://…\")`".to_owned());
        }
        if self.tasks.is_empty() {
            return wrong("no tasks: call `.task(name, handler)`".to_owned());
        }
        if self.concurrency == 0 {
            return wrong("concurrency must be at least 1".to_owned());
        }
        if let Some(kind) = self.doubled_state {
            return wrong(format!("two states of type {kind}: a handler could not tell them apart"));
        }
        let config = self.config()?;
        let brokers = brokers(&config)?;
        let backend = result_backend(&config)?;
        let zone = TimeZone::get(&config.timezone)
            .map_err(|error| Error::Config(format!("timezone {:?}: {error}", config.timezone)))?;
        let results = Results {
            zone,
            node: config.hostname.clone(),
            extended: self.result_extended,
            expires: self.result_expires,
            rpc: config.backend.url.starts_with("rpc:"),
        };
        let ignored =
            config.tasks.iter().map(|(name, policy)| (name.clone(), policy.ignore_result)).collect();
        let tasks = self
            .tasks
            .into_iter()
            .map(|task| (task.name, Task { run: task.run, ignore_result: task.options.0.ignore_result }));
        let app = App {
            tasks: tasks.collect(),
            states: Arc::new(self.states),
            results: backend.is_some().then(|| results.clone()),
            node: config.hostname.clone(),
        };
        let hooks = NativeHooks {
            backend: backend.clone().map(|backend| (backend, results)),
            ignored,
            node: config.hostname.clone(),
        };
        let parts = Parts {
            brokers,
            backend,
            pool: pool::start(app, self.concurrency as usize),
            hooks: Arc::new(hooks),
            stop: self.stop,
            signals: self.signals,
        };
        Ok((config, parts))
    }

    /// The configuration, through the same door as that of a Python app.
    fn config(&self) -> Result<Config, Error> {
        let accept = self.accept.iter().map(|name| match name.as_str() {
            "json" | "application/json" => Ok("application/json"),
            "pickle" | "application/x-python-serialize" => Ok("application/x-python-serialize"),
            other => Err(Error::Config(format!(
                "accept_content: native tasks read json and pickle, not {other:?}"
            ))),
        });
        let accept: Vec<&str> = accept.collect::<Result<_, _>>()?;
        let hostname = match &self.hostname {
            Some(name) if name.is_empty() => {
                return Err(Error::Config("hostname must not be empty".to_owned()));
            }
            Some(name) => name.clone(),
            None => format!("celery@{}", rustix::system::uname().nodename().to_string_lossy()),
        };
        // Celery's defaults; `control_queue_expires` and its kind among them.
        let control = json!({
            "exchange": "celery", "queue_ttl": 300.0, "queue_expires": 10.0,
            "queue_exclusive": false, "queue_durable": false,
        });
        // As Celery: events go by pub/sub on Redis.
        let by_pub_sub = |url: &String| {
            let scheme = url.split("://").next().unwrap_or_default();
            matches!(scheme.strip_prefix("redis+").unwrap_or(scheme), "redis" | "rediss" | "socket" | "unix")
        };
        let exchange_type = if self.brokers.iter().any(by_pub_sub) { "fanout" } else { "topic" };
        let listens = self.brokers.iter().all(|url| by_pub_sub(url) || url.starts_with("amqp"));
        let config = json!({
            "hostname": hostname,
            "broker": {"urls": self.brokers, "retry": true, "retry_on_startup": true, "heartbeat": 120.0, "connection_timeout": 4.0},
            "queues": [],
            "backend": {
                "url": self.backend.as_deref().unwrap_or_default(),
                "native": self.backend.is_some(),
                "expires": self.result_expires.map(|after| after.as_secs_f64()),
            },
            "pool": {"kind": "native", "concurrency": self.concurrency, "proc_alive_timeout": 4.0},
            "prefetch_multiplier": self.prefetch_multiplier,
            "tasks": {},
            "accept_content": accept,
            "timezone": self.timezone,
            "shutdown": {},
            "control": control,
            "log_info": true,
            "heartbeat": 2.0,
            "cluster": {
                "mingle": listens,
                "gossip": listens.then(|| json!({
                    "name": "celeryev",
                    "bindings": [{
                        "exchange": {"name": "celeryev", "type": exchange_type},
                        "routing_key": "worker.#",
                    }],
                    "durable": false,
                    "auto_delete": true,
                    "no_ack": true,
                    "arguments": {"x-expires": 60_000, "x-message-ttl": 5_000},
                })),
            },
            "events": {
                "enabled": true,
                "task_events": self.task_events,
                "exchange": "celeryev",
                "exchange_type": exchange_type,
                "serializer": "json",
                "software": {
                    "sw_ident": "celeriac",
                    "sw_ver": env!("CARGO_PKG_VERSION"),
                    "sw_sys": rustix::system::uname().sysname().to_string_lossy(),
                },
            },
            "http": self.http,
        });
        let mut config = Config::from_json(&Value::to_string(&config))?;
        let mut names = self.queues.clone();
        if names.is_empty() {
            names.push("celery".to_owned());
        }
        for name in names {
            if name.is_empty() || config.queues.iter().any(|queue| queue.name == name) {
                return Err(Error::Config(format!("queue {name:?} is empty or named twice")));
            }
            config.queues.push(Queue::named(&name));
        }
        let mut seen = BTreeMap::new();
        for task in &self.tasks {
            let name = &task.name;
            if name.is_empty() {
                return Err(Error::Config("a task has an empty name".to_owned()));
            }
            task.options.check(name)?;
            (task.check)(&self.states).map_err(|error| Error::Config(format!("task {name:?}: {error}")))?;
            if seen.insert(name.clone(), task.options.0.clone()).is_some() {
                return Err(Error::Config(format!("two tasks are named {name:?}")));
            }
        }
        config.tasks = HashMap::from_iter(seen);
        Ok(config)
    }
}

fn brokers(config: &Config) -> Result<Vec<Arc<dyn Broker>>, Error> {
    let mut brokers = Vec::new();
    for url in &config.broker.urls {
        match broker::by_url(url, &config.broker)? {
            Some(broker) => brokers.push(broker),
            None => {
                let shown = mask(url);
                return Err(Error::Config(format!(
                    "broker {shown}: a native app speaks redis, amqp, filesystem and memory, not this scheme"
                )));
            }
        }
    }
    Ok(brokers)
}

fn result_backend(config: &Config) -> Result<Option<Arc<dyn ResultBackend>>, Error> {
    let url = &config.backend.url;
    if url.is_empty() || url.starts_with("disabled") {
        return Ok(None);
    }
    match backend::by_url(&config.backend, &config.broker)? {
        Some(backend) => Ok(Some(backend)),
        None => Err(Error::Config(format!(
            "result backend {}: a native app writes to redis, rpc and file, not to this scheme",
            mask(url)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::{Args, State, TaskError};

    async fn add(Args((x, y)): Args<(i64, i64)>) -> Result<i64, TaskError> {
        Ok(x + y)
    }

    async fn stateful(State(_): State<String>) -> Result<(), TaskError> {
        Ok(())
    }

    fn good() -> WorkerBuilder {
        Worker::builder().broker("memory://builder").task("tasks.add", add).handle_signals(false)
    }

    #[tokio::test]
    async fn what_is_wrong_is_named_before_anything_starts() {
        for (builder, named) in [
            (Worker::builder().task("tasks.add", add), "no broker"),
            (Worker::builder().broker("memory://builder"), "no tasks"),
            (good().task("tasks.add", add), "two tasks are named \"tasks.add\""),
            (good().task("", add), "empty name"),
            (good().concurrency(0), "concurrency"),
            (good().task("tasks.s", stateful), "no state of type alloc::string::String"),
            (good().state(1_u8).state(2_u8), "two states of type u8"),
            (good().broker("gopher://user:secret@host"), "gopher://user:**@host"),
            (good().backend("gopher://user:secret@host"), "gopher://user:**@host"),
            (good().queue("a").queue("a"), "queue \"a\""),
            (good().accept_content(["yaml"]), "\"yaml\""),
            (good().timezone("Mars/Olympus"), "Mars/Olympus"),
            (good().hostname(""), "hostname"),
            (
                good().task_with("tasks.b", TaskOptions::new().time_limit(Duration::ZERO), add),
                "task \"tasks.b\": time_limit",
            ),
            (good().task_with("tasks.b", TaskOptions::new().rate_limit(f64::NAN), add), "rate_limit"),
        ] {
            match builder.build() {
                Err(Error::Config(text)) => assert!(text.contains(named), "{text} does not name {named}"),
                Err(other) => panic!("{named}: {other}"),
                Ok(_) => panic!("{named}: accepted"),
            }
        }
    }

    #[tokio::test]
    async fn the_defaults_are_celerys() {
        let (config, parts) = good().state("s".to_owned()).task("tasks.s", stateful).build().unwrap();
        assert_eq!(config.queues, [Queue::named("celery")]);
        assert_eq!(config.accept_content, ["application/json"]);
        assert_eq!(config.prefetch_multiplier, 4);
        assert!(config.hostname.starts_with("celery@"));
        assert!(config.tasks["tasks.add"].acks_on_failure && !config.tasks["tasks.add"].acks_late);
        assert!(parts.backend.is_none());
    }
}
