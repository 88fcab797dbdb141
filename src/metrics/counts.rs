//! The numbers, as the worker's loop keeps them.

use std::collections::HashMap;

use crate::pool::Gone;
use crate::protocol::{Message, TaskHeaders};

/// Upper bounds of a histogram's buckets, seconds; those of celery-exporter. One more is for all above.
pub(super) const BOUNDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// Exception classes that are told apart. Their names come from `repr`, which an app may define as it likes.
const MOST_EXCEPTIONS: usize = 100;

/// Observations by size.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    /// How many fell into each bucket.
    pub(super) counts: [u64; BOUNDS.len() + 1],
    /// Their sum.
    pub(super) sum: f64,
}

impl Distribution {
    /// One more.
    pub fn observe(&mut self, seconds: f64) {
        let seconds = if seconds.is_finite() { seconds.max(0.0) } else { 0.0 };
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.counts[bucket] += 1;
        self.sum += seconds;
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// The numbers of one task from one queue.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) task: String,
    pub(super) queue: String,
    pub(super) received: u64,
    pub(super) started: u64,
    pub(super) succeeded: u64,
    /// By exception class, as an index into [`Counts::exceptions`].
    pub(super) failed: Vec<(usize, u64)>,
    pub(super) rejected: u64,
    pub(super) revoked: u64,
    pub(super) retried: u64,
    pub(super) ignored: u64,
    pub(super) runtime: Distribution,
    pub(super) wait: Distribution,
}

/// Names a task and a queue together, for as long as the worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeriesId(usize);

/// Why a message could not become a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No such task.
    Unknown,
    /// Not a task message.
    Malformed,
    /// Its body cannot be decoded.
    Undecodable,
    /// Its `eta` lies outside of all time.
    Eta,
}

/// All that is counted.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub(super) series: Vec<Series>,
    /// By task, then by queue; a task has few queues.
    index: HashMap<String, Vec<(String, SeriesId)>>,
    pub(super) exceptions: Vec<String>,
    /// By [`Refused`].
    pub(super) refused: [u64; 4],
    /// By [`crate::broker::Settlement`]; filled in when it is asked for.
    pub settled: [u64; 4],
    /// By [`Gone`].
    pub(super) ended: [u64; 6],
    /// Results that the backend has.
    pub results_written: u64,
    /// Results that it refused.
    pub results_failed: u64,
    /// Connections made.
    pub connections: u64,
    /// Attempts to connect that failed.
    pub connection_failures: u64,
    /// Messages whose lease was renewed.
    pub lease_renewals: u64,
    /// Messages whose lease was lost.
    pub leases_lost: u64,
}

impl Counts {
    /// The numbers of a registered task from a consumed queue: nothing else must come here, as each is kept for ever.
    pub fn series(&mut self, task: &str, queue: &str) -> SeriesId {
        if let Some(queues) = self.index.get(task)
            && let Some((_, id)) = queues.iter().find(|(name, _)| name == queue)
        {
            return *id;
        }
        let id = SeriesId(self.series.len());
        self.series.push(Series {
            task: task.to_owned(),
            queue: queue.to_owned(),
            received: 0,
            started: 0,
            succeeded: 0,
            failed: Vec::new(),
            rejected: 0,
            revoked: 0,
            retried: 0,
            ignored: 0,
            runtime: Distribution::default(),
            wait: Distribution::default(),
        });
        self.index.entry(task.to_owned()).or_default().push((queue.to_owned(), id));
        id
    }

    fn with(&mut self, id: Option<SeriesId>, change: impl FnOnce(&mut Series)) {
        if let Some(series) = id.and_then(|id| self.series.get_mut(id.0)) {
            change(series);
        }
    }

    /// A message of the task came.
    pub fn received(&mut self, id: Option<SeriesId>) {
        self.with(id, |series| series.received += 1);
    }

    /// A child was given the task, so many seconds after it was sent, where that is known.
    pub fn started(&mut self, id: Option<SeriesId>, waited: Option<f64>) {
        self.with(id, |series| {
            series.started += 1;
            if let Some(seconds) = waited {
                series.wait.observe(seconds);
            }
        });
    }

    /// It returned.
    pub fn succeeded(&mut self, id: Option<SeriesId>, runtime: f64) {
        self.with(id, |series| {
            series.succeeded += 1;
            series.runtime.observe(runtime);
        });
    }

    /// It failed with an exception of this `repr`.
    pub fn failed(&mut self, id: Option<SeriesId>, exception: &str) {
        let class = class_name(exception);
        let known = self.exceptions.iter().position(|name| name == class);
        let index = known.unwrap_or_else(|| {
            if self.exceptions.len() < MOST_EXCEPTIONS {
                self.exceptions.push(class.to_owned());
                return self.exceptions.len() - 1;
            }
            // The last place is for all that came too late.
            if self.exceptions.len() == MOST_EXCEPTIONS {
                self.exceptions.push("other".to_owned());
            }
            MOST_EXCEPTIONS
        });
        self.with(id, |series| match series.failed.iter_mut().find(|(one, _)| *one == index) {
            Some((_, count)) => *count += 1,
            None => series.failed.push((index, 1)),
        });
    }

    /// It raised `Reject`.
    pub fn rejected(&mut self, id: Option<SeriesId>) {
        self.with(id, |series| series.rejected += 1);
    }

    /// It was revoked, expired or terminated.
    pub fn revoked(&mut self, id: Option<SeriesId>) {
        self.with(id, |series| series.revoked += 1);
    }

    /// It will be retried.
    pub fn retried(&mut self, id: Option<SeriesId>) {
        self.with(id, |series| series.retried += 1);
    }

    /// It raised `Ignore`.
    pub fn ignored(&mut self, id: Option<SeriesId>) {
        self.with(id, |series| series.ignored += 1);
    }

    /// A message could not become a task.
    pub fn refused(&mut self, why: Refused) {
        self.refused[why as usize] += 1;
    }

    /// A child ended.
    pub fn child_ended(&mut self, why: Gone) {
        self.ended[why as usize] += 1;
    }

    /// How often each task was started, for `inspect stats`.
    pub fn totals(&self) -> impl Iterator<Item = (&str, u64)> {
        let of = |queues: &Vec<(String, SeriesId)>| {
            queues.iter().filter_map(|(_, id)| self.series.get(id.0)).map(|series| series.started).sum()
        };
        self.index
            .iter()
            .map(move |(task, queues)| (task.as_str(), of(queues)))
            .filter(|(_, count)| *count > 0)
    }
}

/// `ValueError` of `ValueError('x')`, as celery-exporter reads it.
fn class_name(shown: &str) -> &str {
    match shown.split_once('(') {
        Some((name, _))
            if !name.is_empty() && name.chars().all(|one| one.is_alphanumeric() || one == '_') =>
        {
            name
        }
        _ => "UnknownException",
    }
}

/// When a message was sent, seconds since the epoch, where it says so: see the metric's row in the table.
pub fn sent_at(headers: &TaskHeaders, message: &Message) -> Option<f64> {
    if let Some(millis) = headers.timestamp_in_ms.as_ref().and_then(serde_json::Value::as_f64) {
        return Some(millis / 1000.0);
    }
    // Read only where it is likely to be there: few messages have it.
    const NAME: &[u8] = b"\"timestamp\"";
    let properties = message.properties.as_bytes();
    if !properties.windows(NAME.len()).any(|window| window == NAME) {
        return None;
    }
    message.properties.value().ok()?.get("timestamp")?.as_f64()
}

/// The worker at one moment.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// The node's name.
    pub node: String,
    /// What was counted.
    pub counts: Counts,
    /// Queues that are consumed.
    pub queues: Vec<String>,
    /// Concerns and their rungs.
    pub rungs: Vec<(String, String)>,
    /// Rungs and their tasks.
    pub tasks: Vec<(String, u64)>,
    /// Running tasks.
    pub active: u64,
    /// Processes.
    pub processes: u64,
    /// Slots that are up.
    pub slots: u64,
    /// Waiting for a child or their turn.
    pub reserved: u64,
    /// Waiting for their time in memory.
    pub scheduled: u64,
    /// Waiting for their time in the broker.
    pub parked: u64,
    /// Held of the broker's.
    pub unsettled: u64,
    /// What the broker may give.
    pub prefetch: u64,
    /// Results that are not written yet.
    pub unwritten: u64,
    /// Whether there is a connection.
    pub connected: bool,
    /// When the loop began.
    pub started: f64,
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::protocol::Json;

    #[test]
    fn exceptions_are_named_by_their_class_and_their_number_is_bounded() {
        let mut counts = Counts::default();
        let id = Some(counts.series("add", "celery"));
        for shown in ["ValueError('x')", "ValueError()", "<Odd object at 0x7f>", "not a name('x')"] {
            counts.failed(id, shown);
        }
        assert_eq!(counts.exceptions, ["ValueError", "UnknownException"]);
        assert_eq!(counts.series[0].failed, [(0, 2), (1, 2)]);
        for number in 0..500 {
            counts.failed(id, &format!("E{number}()"));
        }
        assert_eq!(counts.exceptions.len(), MOST_EXCEPTIONS + 1);
        assert_eq!(counts.exceptions.last().map(String::as_str), Some("other"));
        let all: u64 = counts.series[0].failed.iter().map(|(_, count)| count).sum();
        assert_eq!(all, 504);
    }

    #[test]
    fn an_observation_falls_into_the_first_bucket_that_holds_it() {
        let mut runtime = Distribution::default();
        for seconds in [0.0, 0.005, 0.006, 10.0, 11.0, -3.0, f64::NAN] {
            runtime.observe(seconds);
        }
        assert_eq!((runtime.counts[0], runtime.counts[1]), (4, 1));
        assert_eq!((runtime.counts[13], runtime.counts[14], runtime.count()), (1, 1, 7));
    }

    #[test]
    fn the_time_of_sending_is_the_brokers_header_or_else_the_property() {
        let message = |properties: &'static str| Message {
            content_type: None,
            content_encoding: None,
            headers: Json::empty(),
            properties: Json(Bytes::from_static(properties.as_bytes())),
            body: Bytes::new(),
        };
        let with = |millis: Option<serde_json::Value>| TaskHeaders {
            timestamp_in_ms: millis,
            ..TaskHeaders::default()
        };
        let stamped = message(r#"{"timestamp": 12}"#);
        assert_eq!(sent_at(&with(Some(1500.into())), &stamped), Some(1.5));
        assert_eq!(sent_at(&with(None), &stamped), Some(12.0));
        assert_eq!(sent_at(&with(Some("soon".into())), &message("{}")), None);
        assert_eq!(sent_at(&with(None), &message(r#"{"timestamp": "x"}"#)), None);
    }

    #[test]
    fn totals_add_up_the_queues_of_a_task_and_leave_out_what_never_started() {
        let mut counts = Counts::default();
        let (here, there) = (counts.series("add", "a"), counts.series("add", "b"));
        let idle = counts.series("idle", "a");
        assert_eq!(counts.series("add", "b"), there);
        for id in [here, there, there] {
            counts.started(Some(id), None);
        }
        counts.received(Some(idle));
        assert_eq!(counts.totals().collect::<Vec<_>>(), [("add", 3)]);
    }
}
