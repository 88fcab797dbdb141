//! The numbers as Prometheus reads them.

use std::borrow::Cow;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::counts::{BOUNDS, Distribution, Figures, Refused, Series};
use super::{Kind, Metric, TABLE};
use crate::broker::Settlement;
use crate::pool::Gone;

const REFUSED: [(Refused, &str); 4] = [
    (Refused::Unknown, "unknown"),
    (Refused::Malformed, "malformed"),
    (Refused::Undecodable, "undecodable"),
    (Refused::Eta, "eta"),
];
const SETTLED: [(Settlement, &str); 4] = [
    (Settlement::Ack, "ack"),
    (Settlement::Reject, "reject"),
    (Settlement::Requeue, "requeue"),
    (Settlement::GiveBack, "give_back"),
];
const ENDED: [(Gone, &str); 6] = [
    (Gone::Tasks, "tasks"),
    (Gone::Memory, "memory"),
    (Gone::TimeLimit, "time_limit"),
    (Gone::Terminated, "terminated"),
    (Gone::Lost, "lost"),
    (Gone::Stillborn, "stillborn"),
];

/// All metrics, as text.
pub fn render(figures: Figures) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(figures));
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = text::encode(&mut out, &registry);
    out
}

enum Value<'a> {
    Number(f64),
    Count(u64),
    Observed(&'a Distribution),
}

/// Values of the labels of the metric's row, in order, and the number.
type Sample<'a> = (Vec<&'a str>, Value<'a>);

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for row in TABLE {
            let samples = self.samples(row.metric);
            if samples.is_empty() {
                continue;
            }
            let kind = match row.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let mut family = encoder.encode_descriptor(row.name, row.help, None, kind)?;
            for (labels, value) in samples {
                let labels: Vec<(&str, Cow<'_, str>)> =
                    row.labels.iter().copied().zip(labels.into_iter().map(escaped)).collect();
                write(family.encode_family(&labels)?, row.kind, &value)?;
            }
        }
        Ok(())
    }
}

/// A label's value as it is written: the encoder leaves that to its callers.
fn escaped(value: &str) -> Cow<'_, str> {
    if value.contains(['\\', '"', '\n']) {
        Cow::Owned(value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n"))
    } else {
        Cow::Borrowed(value)
    }
}

fn write(mut encoder: MetricEncoder<'_>, kind: Kind, value: &Value<'_>) -> fmt::Result {
    match (kind, value) {
        (Kind::Counter, Value::Count(count)) => encoder.encode_counter::<NoLabelSet, _, u64>(count, None),
        (Kind::Counter, Value::Number(number)) => encoder.encode_counter::<NoLabelSet, _, u64>(number, None),
        (_, Value::Count(count)) => encoder.encode_gauge(&(*count as f64)),
        (_, Value::Number(number)) => encoder.encode_gauge(number),
        (_, Value::Observed(observed)) => {
            let bounds = BOUNDS.iter().copied().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(observed.counts).collect();
            encoder.encode_histogram::<NoLabelSet>(observed.sum, observed.count(), &buckets, None)
        }
    }
}

impl Figures {
    fn host(&self) -> &str {
        self.node.split_once('@').map_or(self.node.as_str(), |(_, host)| host)
    }

    fn samples(&self, metric: Metric) -> Vec<Sample<'_>> {
        let counts = &self.counts;
        match metric {
            Metric::TaskReceived => self.tasks_by(|series| Value::Count(series.received)),
            Metric::TaskStarted => self.tasks_by(|series| Value::Count(series.started)),
            Metric::TaskSucceeded => self.tasks_by(|series| Value::Count(series.succeeded)),
            Metric::TaskFailed => self.failures(),
            Metric::TaskRejected => self.tasks_by(|series| Value::Count(series.rejected)),
            Metric::TaskRevoked => self.tasks_by(|series| Value::Count(series.revoked)),
            Metric::TaskRetried => self.tasks_by(|series| Value::Count(series.retried)),
            Metric::TaskRuntime => self.tasks_by(|series| Value::Observed(&series.runtime)),
            Metric::WorkerUp => self.node_wide(1),
            Metric::WorkerTasksActive => self.node_wide(self.active),
            Metric::ActiveWorkerCount => self.by_queue(1),
            Metric::ActiveProcessCount => self.by_queue(self.processes),
            Metric::TaskIgnored => self.tasks_by(|series| Value::Count(series.ignored)),
            Metric::QueueWait => self.tasks_by(|series| Value::Observed(&series.wait)),
            Metric::Reserved => self.node_wide(self.reserved),
            Metric::Scheduled => {
                vec![
                    (vec![self.host(), "worker"], Value::Count(self.scheduled)),
                    (vec![self.host(), "broker"], Value::Count(self.parked)),
                ]
            }
            Metric::Unsettled => self.node_wide(self.unsettled),
            Metric::PrefetchLimit => self.node_wide(self.prefetch),
            Metric::Settlements => {
                self.by_word(SETTLED.map(|(one, word)| (word, counts.settled[one as usize])))
            }
            Metric::Refusals => self.by_word(REFUSED.map(|(one, word)| (word, counts.refused[one as usize]))),
            Metric::ResultsWritten => self.node_wide(counts.results_written),
            Metric::ResultsFailed => self.node_wide(counts.results_failed),
            Metric::ResultsWaiting => self.node_wide(self.unwritten),
            Metric::BrokerUp => self.node_wide(u64::from(self.connected)),
            Metric::Connections => self.node_wide(counts.connections),
            Metric::ConnectionFailures => self.node_wide(counts.connection_failures),
            Metric::LeaseRenewals => self.node_wide(counts.lease_renewals),
            Metric::LeasesLost => self.node_wide(counts.leases_lost),
            Metric::ChildrenUp => self.node_wide(self.slots),
            Metric::ChildrenEnded => {
                self.by_word(ENDED.map(|(one, word)| (word, counts.ended[one as usize])))
            }
            Metric::Concerns => self
                .rungs
                .iter()
                .map(|(concern, rung)| (vec![self.host(), concern, rung], Value::Count(1)))
                .collect(),
            Metric::Tasks => self
                .tasks
                .iter()
                .map(|(rung, count)| (vec![self.host(), rung], Value::Count(*count)))
                .collect(),
            Metric::StartTime => vec![(vec![self.host()], Value::Number(self.started))],
        }
    }

    fn tasks_by<'a>(&'a self, value: impl Fn(&'a Series) -> Value<'a>) -> Vec<Sample<'a>> {
        let labels = |series: &'a Series| vec![series.task.as_str(), self.host(), series.queue.as_str()];
        self.counts.series.iter().map(|series| (labels(series), value(series))).collect()
    }

    fn failures(&self) -> Vec<Sample<'_>> {
        let mut samples = Vec::new();
        for series in &self.counts.series {
            for (exception, count) in &series.failed {
                let exception = self.counts.exceptions[*exception].as_str();
                let labels = vec![series.task.as_str(), self.host(), exception, series.queue.as_str()];
                samples.push((labels, Value::Count(*count)));
            }
        }
        samples
    }

    fn node_wide(&self, count: u64) -> Vec<Sample<'_>> {
        vec![(vec![self.host()], Value::Count(count))]
    }

    fn by_queue(&self, count: u64) -> Vec<Sample<'_>> {
        self.queues.iter().map(|queue| (vec![queue.as_str()], Value::Count(count))).collect()
    }

    fn by_word<const N: usize>(&self, counts: [(&'static str, u64); N]) -> Vec<Sample<'_>> {
        counts.into_iter().map(|(word, count)| (vec![self.host(), word], Value::Count(count))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        let mut figures = Figures {
            node: "celery@box".to_owned(),
            queues: vec!["celery".to_owned()],
            processes: 2,
            ..Figures::default()
        };
        let counts = &mut figures.counts;
        let id = Some(counts.series("tasks.\"odd\"\n", "celery"));
        counts.received(id);
        counts.started(id, Some(0.3));
        counts.succeeded(id, 0.02);
        counts.failed(id, "KeyError('x')");
        figures
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let text = render(figures());
        let task = r#"name="tasks.\"odd\"\n",hostname="box",queue_name="celery""#;
        for line in [
            "# TYPE celery_task_received counter".to_owned(),
            format!("celery_task_received_total{{{task}}} 1"),
            format!(r#"celery_task_runtime_bucket{{le="0.01",{task}}} 0"#),
            format!(r#"celery_task_runtime_bucket{{le="0.025",{task}}} 1"#),
            format!(r#"celery_task_runtime_bucket{{le="+Inf",{task}}} 1"#),
            format!("celery_task_runtime_sum{{{task}}} 0.02"),
            format!(r#"celeriac_task_queue_wait_seconds_bucket{{le="0.5",{task}}} 1"#),
            r#"celery_worker_up{hostname="box"} 1.0"#.to_owned(),
            r#"celery_active_process_count{queue_name="celery"} 2.0"#.to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(text.contains(r#"exception="KeyError",queue_name="celery"} 1"#), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn words_stand_for_what_was_counted() {
        let mut figures = figures();
        // Each a different number, so that none stands for another.
        let times = |count: usize| 0..count;
        for (index, (settlement, _)) in SETTLED.into_iter().enumerate() {
            figures.counts.settled[settlement as usize] = index as u64 + 1;
        }
        for (index, (why, _)) in REFUSED.into_iter().enumerate() {
            times(index + 1).for_each(|_| figures.counts.refused(why));
        }
        for (index, (why, _)) in ENDED.into_iter().enumerate() {
            times(index + 1).for_each(|_| figures.counts.child_ended(why));
        }
        let text = render(figures);
        for line in [
            r#"celeriac_settlements_total{hostname="box",settlement="requeue"} 3"#,
            r#"celeriac_messages_refused_total{hostname="box",reason="malformed"} 2"#,
            r#"celeriac_children_ended_total{hostname="box",reason="stillborn"} 6"#,
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
