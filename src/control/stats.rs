//! Figures of a worker, as `inspect stats` shows them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::broker::BrokerConfig;

/// Figures of a worker.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Tasks accepted, by name.
    pub total: BTreeMap<String, u64>,
    /// Time since the start.
    pub uptime: Duration,
    /// The pool.
    pub pool: PoolStats,
    /// [`broker`] of the connection in use.
    pub broker: Value,
    /// Deliveries that may be unsettled.
    pub prefetch_count: u32,
    /// Bounds and size under autoscale.
    pub autoscaler: Option<Value>,
}

/// Figures of a pool.
#[derive(Clone, Debug, Default)]
pub struct PoolStats {
    /// What [`crate::pool::Pool::name`] says.
    pub name: String,
    /// Slots.
    pub capacity: usize,
    /// Processes.
    pub pids: Vec<u32>,
    /// Most tasks of a child.
    pub max_tasks_per_child: Option<u32>,
    /// Time limits of the worker: soft, hard.
    pub timeouts: (Option<f64>, Option<f64>),
    /// Jobs given to children so far.
    pub writes: u64,
    /// Jobs that run.
    pub active: usize,
}

impl Stats {
    /// The reply.
    pub(super) fn show(&self, clock: u64) -> Value {
        let pool = &self.pool;
        let implementation = match pool.name.as_str() {
            "prefork" => "celery.concurrency.prefork:TaskPool",
            "threads" => "celery.concurrency.thread:TaskPool",
            "solo" => "celery.concurrency.solo:TaskPool",
            "gevent" => "celery.concurrency.gevent:TaskPool",
            "eventlet" => "celery.concurrency.eventlet:TaskPool",
            other => other,
        };
        let threads = (pool.name == "eventlet").then(|| {
            json!({
                "free-threads": pool.capacity.saturating_sub(pool.active),
                "running-threads": pool.active,
            })
        });
        let average = self.pool.writes as f64 / pool.capacity.max(1) as f64;
        let seconds = |limit: Option<f64>| limit.map_or(json!(0), |limit| json!(limit));
        let mut shown = json!({
            "total": self.total,
            "pid": std::process::id(),
            "clock": clock.to_string(),
            "uptime": self.uptime.as_secs(),
            "pool": {
                "implementation": implementation,
                "max-concurrency": pool.capacity,
                "processes": pool.pids,
                "max-tasks-per-child": pool.max_tasks_per_child.map_or(json!("N/A"), |most| json!(most)),
                "put-guarded-by-semaphore": false,
                "timeouts": [seconds(pool.timeouts.0), seconds(pool.timeouts.1)],
                "writes": {
                    "total": pool.writes,
                    "avg": format!("{average:.2}"),
                    "all": "N/A",
                    "raw": "N/A",
                    "strategy": "fair",
                    "inqueues": {"total": pool.capacity, "active": pool.active},
                },
            },
            "broker": self.broker,
            "prefetch_count": self.prefetch_count,
            "rusage": rusage(),
        });
        if let Some(autoscaler) = &self.autoscaler {
            shown["autoscaler"] = autoscaler.clone();
        }
        if let (Some(Value::Object(threads)), Some(figures)) = (threads, shown["pool"].as_object_mut()) {
            figures.extend(threads);
        }
        shown
    }
}

/// What kombu's `Connection.info()` says of a broker address, but for the password.
pub fn broker(address: &str, config: &BrokerConfig) -> Value {
    let parsed = url::Url::parse(address).ok();
    let scheme = address.split("://").next().unwrap_or_default();
    let (transport, ssl) = match scheme {
        "rediss" => ("redis", true),
        "amqps" => ("amqp", true),
        "redis+socket" => ("redis", false),
        other => (other, false),
    };
    let default_port = match transport {
        "redis" => Some(6379),
        "amqp" => Some(if ssl { 5671 } else { 5672 }),
        _ => None,
    };
    let virtual_host = parsed.as_ref().map(|url| url.path().trim_start_matches('/').to_owned());
    let user = parsed.as_ref().map(url::Url::username).filter(|user| !user.is_empty());
    let ssl = ssl || config.use_ssl.as_bool().unwrap_or(config.use_ssl.is_object());
    let failover = config.failover_strategy.clone().unwrap_or_else(|| "round-robin".to_owned());
    let alternates: Vec<String> = config.urls.iter().map(|url| crate::error::mask(url)).collect();
    json!({
        "hostname": parsed.as_ref().and_then(url::Url::host_str),
        "userid": user,
        "virtual_host": match (transport, virtual_host.as_deref()) {
            ("amqp", Some("")) => Some("/".to_owned()),
            ("redis", Some("")) => Some("0".to_owned()),
            _ => virtual_host,
        },
        "port": parsed.as_ref().and_then(url::Url::port).or(default_port),
        "insist": false,
        "ssl": ssl,
        "transport": transport,
        "connect_timeout": config.connection_timeout,
        "transport_options": config.transport_options,
        "login_method": config.login_method,
        "uri_prefix": null,
        "heartbeat": config.heartbeat.unwrap_or(0.0),
        "failover_strategy": failover,
        "alternates": if alternates.len() > 1 { alternates } else { Vec::new() },
        "credential_provider": null,
    })
}

/// What the kernel says of this process, by the names of `getrusage`; what Linux does not keep is 0.
fn rusage() -> Value {
    /// `USER_HZ`, the same on every Linux.
    const TICKS: f64 = 100.0;
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    let stat = read("stat");
    // The second field is the command in parentheses, which may itself hold anything.
    let fields: Vec<f64> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0.0);
    let pick = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let (status, io) = (read("status"), read("io"));
    let mut usage = Map::new();
    usage.insert("utime".to_owned(), json!(field(14) / TICKS));
    usage.insert("stime".to_owned(), json!(field(15) / TICKS));
    let counts = [
        ("maxrss", pick(&status, "VmHWM")),
        ("ixrss", 0),
        ("idrss", 0),
        ("isrss", 0),
        ("minflt", field(10) as u64),
        ("majflt", field(12) as u64),
        ("nswap", 0),
        ("inblock", pick(&io, "read_bytes") / 512),
        ("oublock", pick(&io, "write_bytes") / 512),
        ("msgsnd", 0),
        ("msgrcv", 0),
        ("nsignals", 0),
        ("nvcsw", pick(&status, "voluntary_ctxt_switches")),
        ("nivcsw", pick(&status, "nonvoluntary_ctxt_switches")),
    ];
    usage.extend(counts.map(|(name, count)| (name.to_owned(), json!(count))));
    Value::Object(usage)
}
