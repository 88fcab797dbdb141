//! Metrics: every name, once, in [`TABLE`]; what the worker counts (`counts`); and the text that is scraped (`text`).
//!
//! The worker's loop owns the numbers, plain integers, and gives a copy when somebody asks. Labels are bounded: names of
//! registered tasks, of consumed queues, of exception classes up to a number, and words of ours. Nothing that a message
//! says of itself becomes one.
//!
//! Where [celery-exporter](https://github.com/danihodovic/celery-exporter) has a metric, name and labels are its.

mod counts;
mod text;

use std::fmt::Write;

pub use counts::{Counts, Distribution, Figures, Refused, SeriesId, sent_at};
pub use text::render;

/// What kind of number it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, from the start of the worker on.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations by size.
    Histogram,
}

/// A metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table says what each is")]
pub enum Metric {
    TaskReceived,
    TaskStarted,
    TaskSucceeded,
    TaskFailed,
    TaskRejected,
    TaskRevoked,
    TaskRetried,
    TaskRuntime,
    WorkerUp,
    WorkerTasksActive,
    ActiveWorkerCount,
    ActiveProcessCount,
    TaskIgnored,
    QueueWait,
    Reserved,
    Scheduled,
    Unsettled,
    PrefetchLimit,
    Settlements,
    Refusals,
    ResultsWritten,
    ResultsFailed,
    ResultsWaiting,
    BrokerUp,
    Connections,
    ConnectionFailures,
    LeaseRenewals,
    LeasesLost,
    ChildrenUp,
    ChildrenEnded,
    Concerns,
    Tasks,
    StartTime,
}

/// A row of [`TABLE`].
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Which.
    pub metric: Metric,
    /// Its name, without the endings that its kind adds when it is scraped.
    pub name: &'static str,
    /// What kind of number.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

const TASK: &[&str] = &["name", "hostname", "queue_name"];
const NODE: &[&str] = &["hostname"];

const fn row(
    metric: Metric,
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    help: &'static str,
) -> Row {
    Row { metric, name, kind, labels, help }
}

/// Every metric, in the order in which they are scraped; that of [`Metric`].
pub const TABLE: &[Row] = &[
    // Names and labels of celery-exporter.
    row(
        Metric::TaskReceived,
        "celery_task_received",
        Kind::Counter,
        TASK,
        "Messages of known tasks that this worker took from their queue",
    ),
    row(Metric::TaskStarted, "celery_task_started", Kind::Counter, TASK, "Tasks handed to a child"),
    row(Metric::TaskSucceeded, "celery_task_succeeded", Kind::Counter, TASK, "Tasks that returned"),
    row(
        Metric::TaskFailed,
        "celery_task_failed",
        Kind::Counter,
        &["name", "hostname", "exception", "queue_name"],
        "Tasks that raised, passed their hard time limit or lost their child; exception classes beyond the first hundred are `other`",
    ),
    row(
        Metric::TaskRejected,
        "celery_task_rejected",
        Kind::Counter,
        TASK,
        "Tasks that raised `Reject`, with or without requeue",
    ),
    row(
        Metric::TaskRevoked,
        "celery_task_revoked",
        Kind::Counter,
        TASK,
        "Tasks that were revoked, expired or terminated",
    ),
    row(Metric::TaskRetried, "celery_task_retried", Kind::Counter, TASK, "Tasks that asked to be retried"),
    row(
        Metric::TaskRuntime,
        "celery_task_runtime",
        Kind::Histogram,
        TASK,
        "Seconds that tasks which returned took, as their child measured it",
    ),
    row(Metric::WorkerUp, "celery_worker_up", Kind::Gauge, NODE, "1 while the worker's loop turns"),
    row(
        Metric::WorkerTasksActive,
        "celery_worker_tasks_active",
        Kind::Gauge,
        NODE,
        "Tasks that run in a child now",
    ),
    row(
        Metric::ActiveWorkerCount,
        "celery_active_worker_count",
        Kind::Gauge,
        &["queue_name"],
        "1 for each queue that this worker consumes: the sum over all workers is the number of workers of a queue",
    ),
    row(
        Metric::ActiveProcessCount,
        "celery_active_process_count",
        Kind::Gauge,
        &["queue_name"],
        "Processes of this worker, for each queue that it consumes",
    ),
    // Our own.
    row(
        Metric::TaskIgnored,
        "celeriac_task_ignored",
        Kind::Counter,
        TASK,
        "Tasks that raised `Ignore`, or were replaced",
    ),
    row(
        Metric::QueueWait,
        "celeriac_task_queue_wait_seconds",
        Kind::Histogram,
        TASK,
        "Seconds from the message's time stamp, or its eta where that is later, until a child is given the task. The stamp is the header `timestamp_in_ms` (RabbitMQ sets it where it is told to) or else the property `timestamp`, in seconds; messages with neither are not counted, and Celery's producers set neither",
    ),
    row(
        Metric::Reserved,
        "celeriac_tasks_reserved",
        Kind::Gauge,
        NODE,
        "Messages in this worker's memory that wait for a child or for their turn under a rate limit",
    ),
    row(
        Metric::Scheduled,
        "celeriac_tasks_scheduled",
        Kind::Gauge,
        &["hostname", "held_by"],
        "Messages that wait for their eta; `held_by`: this `worker`, or the `broker` on its behalf (parked)",
    ),
    row(
        Metric::Unsettled,
        "celeriac_messages_unsettled",
        Kind::Gauge,
        NODE,
        "Messages that the broker has given to this worker and has not been told about",
    ),
    row(
        Metric::PrefetchLimit,
        "celeriac_prefetch_limit",
        Kind::Gauge,
        NODE,
        "How many messages the broker may give to this worker before it is told about any; 0: any number",
    ),
    row(
        Metric::Settlements,
        "celeriac_settlements",
        Kind::Counter,
        &["hostname", "settlement"],
        "What the broker was told about messages: `ack`, `reject`, `requeue`, or `give_back` of what had not started",
    ),
    row(
        Metric::Refusals,
        "celeriac_messages_refused",
        Kind::Counter,
        &["hostname", "reason"],
        "Messages that could not become a task: `unknown` task, `malformed`, `undecodable` body, `eta` outside of all time",
    ),
    row(
        Metric::ResultsWritten,
        "celeriac_results_written",
        Kind::Counter,
        NODE,
        "Results, and counts of chord members, that the supervisor wrote to the backend; children that write them themselves are not counted",
    ),
    row(
        Metric::ResultsFailed,
        "celeriac_results_failed",
        Kind::Counter,
        NODE,
        "Those that the backend refused",
    ),
    row(
        Metric::ResultsWaiting,
        "celeriac_results_waiting",
        Kind::Gauge,
        NODE,
        "Those that the backend does not have yet",
    ),
    row(
        Metric::BrokerUp,
        "celeriac_broker_up",
        Kind::Gauge,
        NODE,
        "1 while the worker is connected to its broker",
    ),
    row(
        Metric::Connections,
        "celeriac_broker_connections",
        Kind::Counter,
        NODE,
        "Connections to the broker that were made; all but the first are reconnects",
    ),
    row(
        Metric::ConnectionFailures,
        "celeriac_broker_connection_failures",
        Kind::Counter,
        NODE,
        "Attempts to connect that failed",
    ),
    row(
        Metric::LeaseRenewals,
        "celeriac_lease_renewals",
        Kind::Counter,
        NODE,
        "Renewals of messages that this worker holds (Redis), so that nobody takes them for lost",
    ),
    row(
        Metric::LeasesLost,
        "celeriac_leases_lost",
        Kind::Counter,
        NODE,
        "Messages that were given to somebody else because this worker was silent for too long (Redis)",
    ),
    row(
        Metric::ChildrenUp,
        "celeriac_slots_up",
        Kind::Gauge,
        NODE,
        "Tasks that could run at the same time now",
    ),
    row(
        Metric::ChildrenEnded,
        "celeriac_children_ended",
        Kind::Counter,
        &["hostname", "reason"],
        "Children that ended, but for those that were told to go: after their number of `tasks`, at their `memory` limit, killed at a `time_limit` or when their task was `terminated`, `lost` (a signal, the kernel, their own exit), `stillborn` before they were up",
    ),
    row(
        Metric::Concerns,
        "celeriac_rung",
        Kind::Gauge,
        &["hostname", "concern", "rung"],
        "1 for the rung that each concern of the app is on, as `celeriac doctor` lists them",
    ),
    row(
        Metric::Tasks,
        "celeriac_rung_tasks",
        Kind::Gauge,
        &["hostname", "rung"],
        "Registered tasks on each rung, as `celeriac doctor` lists them",
    ),
    row(
        Metric::StartTime,
        "celeriac_start_time_seconds",
        Kind::Gauge,
        NODE,
        "When the worker's loop was started, seconds since the epoch",
    ),
];

impl Row {
    /// Its name as it is scraped.
    pub fn scraped(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.name),
            Kind::Gauge => self.name.to_owned(),
            Kind::Histogram => format!("{0}_bucket, {0}_sum, {0}_count", self.name),
        }
    }
}

/// The reference of all metrics, in Markdown, for `docs/metrics.md`.
pub fn reference() -> String {
    let mut text = "# Metrics\n\n\
         Made from `src/metrics/mod.rs` (`celeriac::metrics::reference`); a test compares them, and\n\
         `make docs` writes this page.\n\n\
         `GET /metrics` of the listener that `--http` opens answers in the text format of Prometheus (OpenMetrics). Where\n\
         [celery-exporter](https://github.com/danihodovic/celery-exporter) has a metric, name and labels are its, so that\n\
         dashboards made for it work; `hostname` is the part of the node name behind the `@`. Labels are bounded:\n\
         registered tasks, consumed queues, exception classes up to a number, and fixed words. Counters begin at 0 when\n\
         the worker starts.\n\n\
         Not here: `celery_task_sent_total`, `celery_queue_length` and `celery_active_consumer_count`, which no worker can\n\
         know of itself. Of a task whose `Request` or `Strategy` class is the app's own only `received` and `started` are\n\
         counted (with a strategy `received`): how it ends is decided by the app's objects.\n"
        .to_owned();
    for (title, ours) in [("Those of celery-exporter", false), ("Our own", true)] {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n## {title}\n\n| name | kind | labels | what it says |\n|---|---|---|---|\n");
        for row in TABLE.iter().filter(|row| row.name.starts_with("celeriac_") == ours) {
            let names: Vec<String> = row.scraped().split(", ").map(|name| format!("`{name}`")).collect();
            let labels: Vec<String> = row.labels.iter().map(|label| format!("`{label}`")).collect();
            let kind = match row.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let _ = writeln!(text, "| {} | {kind} | {} | {} |", names.join(" "), labels.join(" "), row.help);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_metric_once_in_the_order_of_the_enum() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.metric as usize, index, "{}", row.name);
            assert!(TABLE.iter().filter(|other| other.name == row.name).count() == 1, "{}", row.name);
        }
        assert_eq!(TABLE.len(), Metric::StartTime as usize + 1);
    }

    #[test]
    fn the_reference_in_the_docs_is_what_the_table_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        if std::env::var_os("CELERIAC_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(written == reference(), "{path} is stale: run `make docs`");
    }
}
