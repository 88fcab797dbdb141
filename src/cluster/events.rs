//! What a worker says of itself and of its tasks: events as Celery sends them, gathered, bounded, and never waited for.
//!
//! An event gets its common fields and the clock when it is sent. Those of the group `task` travel in lists, with the
//! routing key `task.multi`, others each for itself. What the broker does not take yet waits here, up to
//! [`MOST_WAITING`]; then the oldest are dropped and counted, because a monitor can do more with the newest.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::clock::LamportClock;
use crate::broker::Publication;
use crate::protocol::{Json, Message};

/// Task events in one message, Celery's `buffer_limit`.
const MOST_IN_LIST: usize = 24;
/// Messages of which the broker's word is awaited. Few: others that publish over the same connection (what continues a
/// task, replies) must find room in it.
const MOST_UNCONFIRMED: usize = 8;
/// Bytes of events that may wait for the broker: some ten thousand events, seconds of a busy worker.
const MOST_WAITING: usize = 16 << 20;

/// What the configuration says of events.
#[derive(Clone, Debug, Deserialize)]
pub struct EventsConfig {
    /// Whether events are sent at all: not where task events, heartbeats and gossip are off, nor where the transport
    /// has no exchanges.
    pub enabled: bool,
    /// `worker_send_task_events`, `-E`; else only events of the worker itself are sent until remote control asks.
    pub task_events: bool,
    /// `event_exchange`.
    pub exchange: String,
    /// Its type: `topic`, or `fanout` on Redis, as Celery has it.
    pub exchange_type: String,
    /// `event_serializer`. What is not JSON is written by the app's side, one message at a time.
    pub serializer: String,
    /// What the worker says it is.
    pub software: Software,
}

/// What a worker says it is.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Software {
    /// `py-celery`, as monitors know it.
    pub sw_ident: String,
    /// Its version.
    pub sw_ver: String,
    /// The operating system.
    pub sw_sys: String,
}

/// A message with events, on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its place in the order.
    serial: u64,
    routing_key: String,
    body: String,
    events: u64,
}

impl Batch {
    /// The body, before the serializer of the app has written it.
    pub fn body(&self) -> &str {
        &self.body
    }
}

/// Gathers events and hands them out as messages.
#[derive(Debug)]
pub struct Dispatcher {
    config: EventsConfig,
    /// The common fields that never change, as JSON members.
    fixed: String,
    headers: Json,
    zone: TimeZone,
    /// Groups that are sent; empty: all, as in Celery.
    groups: BTreeSet<String>,
    list: Vec<String>,
    waiting: VecDeque<Batch>,
    serial: u64,
    bytes: usize,
    unconfirmed: usize,
    most: usize,
    dropped: u64,
    /// Dropped since the buffer was empty for the last time.
    dropping: u64,
}

impl Dispatcher {
    /// A dispatcher for the worker of this node name and process.
    pub fn new(config: EventsConfig, node: &str, pid: u32) -> Self {
        let groups = if config.task_events { BTreeSet::new() } else { BTreeSet::from(["worker".to_owned()]) };
        Self {
            fixed: format!("\"hostname\":{},\"pid\":{pid}", Value::from(node)),
            headers: Json::of(&json!({"hostname": node})),
            zone: TimeZone::system(),
            groups,
            config,
            list: Vec::new(),
            waiting: VecDeque::new(),
            serial: 0,
            bytes: 0,
            unconfirmed: 0,
            most: MOST_UNCONFIRMED,
            dropped: 0,
            dropping: 0,
        }
    }

    /// The configuration.
    pub fn config(&self) -> &EventsConfig {
        &self.config
    }

    /// Whether events of a group are sent; who builds one asks first.
    pub fn wants(&self, group: &str) -> bool {
        self.config.enabled && (self.groups.is_empty() || self.groups.contains(group))
    }

    /// Sends task events from now on. `false`: they were sent before.
    pub fn enable_tasks(&mut self) -> bool {
        !self.groups.is_empty() && self.groups.insert("task".to_owned())
    }

    /// Sends no task events from now on. `false`: as in Celery, who was started with them goes on.
    pub fn disable_tasks(&mut self) -> bool {
        self.groups.remove("task")
    }

    /// Events that were dropped because the broker did not take them.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Sends an event, if its group is sent. `fields`: what serializes to an object.
    pub fn send(&mut self, clock: &mut LamportClock, kind: &str, fields: &impl Serialize, now: f64) {
        let group = kind.split('-').next().unwrap_or_default();
        if !self.wants(group) {
            return;
        }
        // Fields are text, numbers and maps of them.
        let fields = serde_json::to_string(fields).unwrap_or_default();
        let own = fields.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or_default();
        let comma = if own.is_empty() { "" } else { "," };
        let text = format!(
            "{{\"type\":{},\"timestamp\":{},{},\"utcoffset\":{},\"clock\":{}{comma}{own}}}",
            Value::from(kind),
            Value::from(now),
            self.fixed,
            Value::from(self.offset(now)),
            clock.forward(),
        );
        if group == "task" {
            self.list.push(text);
            if self.list.len() >= MOST_IN_LIST {
                self.flush();
            }
        } else {
            // In the order in which they were sent.
            self.flush();
            self.push(kind.replace('-', "."), text, 1);
        }
    }

    /// Hours that the local time is behind UTC, as Celery has it.
    fn offset(&self, now: f64) -> f64 {
        #[expect(clippy::cast_possible_truncation, reason = "seconds since the epoch")]
        let moment = Timestamp::from_second(now as i64).unwrap_or_default();
        f64::from(-self.zone.to_offset(moment).seconds()) / 3600.0
    }

    /// Closes the list of task events that were gathered.
    fn flush(&mut self) {
        if self.list.is_empty() {
            return;
        }
        let events = self.list.len() as u64;
        let body = format!("[{}]", self.list.join(","));
        self.list.clear();
        self.push("task.multi".to_owned(), body, events);
    }

    fn push(&mut self, routing_key: String, body: String, events: u64) {
        self.serial += 1;
        self.bytes += body.len();
        self.waiting.push_back(Batch { serial: self.serial, routing_key, body, events });
        self.shed();
    }

    fn shed(&mut self) {
        while self.bytes > MOST_WAITING {
            let Some(batch) = self.waiting.pop_front() else { break };
            self.bytes -= batch.body.len();
            if self.dropping == 0 {
                tracing::warn!(
                    target: "celery.worker",
                    "The broker does not take events as fast as they come: the oldest are dropped. Tasks are not held up."
                );
            }
            self.lose(&batch);
        }
    }

    fn lose(&mut self, batch: &Batch) {
        self.dropping += batch.events;
        self.dropped += batch.events;
    }

    /// The next message for the broker; none when there is none, or enough are on their way. Asked once a turn of the
    /// loop, so that a lone event does not wait. Each ends with
    /// [`Dispatcher::confirmed`], [`Dispatcher::again`] or [`Dispatcher::refused`].
    pub fn take(&mut self) -> Option<Batch> {
        // What the app has to write is written one by one, or order would be lost.
        let most = if self.config.serializer == "json" { self.most } else { 1 };
        if self.unconfirmed >= most {
            return None;
        }
        // Only now: what cannot leave yet gathers in lists that are full.
        if self.waiting.is_empty() {
            self.flush();
        }
        let batch = self.waiting.pop_front()?;
        self.bytes -= batch.body.len();
        self.unconfirmed += 1;
        Some(batch)
    }

    /// Everything that waits may be on its way at once: the worker leaves. Not so what the app has to write.
    pub fn release(&mut self) {
        self.most = usize::MAX;
    }

    /// The broker has the message.
    pub fn confirmed(&mut self) {
        self.unconfirmed = self.unconfirmed.saturating_sub(1);
        if self.dropping > 0 && self.waiting.is_empty() {
            tracing::info!(target: "celery.worker", dropped = self.dropping, "The broker takes events again.");
            self.dropping = 0;
        }
    }

    /// The broker may not have the message, which is to be sent again.
    pub fn again(&mut self, batch: Batch) {
        self.unconfirmed = self.unconfirmed.saturating_sub(1);
        self.bytes += batch.body.len();
        // What was sent before it may be back already, or come back later.
        let place = self.waiting.partition_point(|other| other.serial < batch.serial);
        self.waiting.insert(place, batch);
        self.shed();
    }

    /// The broker does not want the message, or it cannot be written.
    pub fn refused(&mut self, batch: &Batch, reason: &str) {
        self.unconfirmed = self.unconfirmed.saturating_sub(1);
        if self.dropping == 0 {
            tracing::error!(target: "celery.worker", reason, "Events cannot be sent and are dropped.");
        }
        self.lose(batch);
    }

    /// A message for the broker; `written`: the body as the app's serializer wrote it, with its type and encoding.
    pub fn publication(&self, batch: &Batch, written: Option<(Bytes, String, String)>) -> Publication {
        let (body, content_type, content_encoding) = written.unwrap_or_else(|| {
            (Bytes::from(batch.body.clone()), "application/json".to_owned(), "utf-8".to_owned())
        });
        Publication {
            exchange: self.config.exchange.clone(),
            exchange_type: Some(self.config.exchange_type.clone()),
            routing_key: batch.routing_key.clone(),
            message: Message {
                content_type: Some(content_type),
                content_encoding: Some(content_encoding),
                headers: self.headers.clone(),
                properties: Json::of(&json!({"delivery_mode": 1, "priority": 0})),
                body,
            },
            declare: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dispatcher(task_events: bool) -> Dispatcher {
        let config = json!({
            "enabled": true, "task_events": task_events, "exchange": "celeryev", "exchange_type": "topic",
            "serializer": "json", "software": {"sw_ident": "py-celery", "sw_ver": "5.7.0", "sw_sys": "Linux"},
        });
        Dispatcher::new(serde_json::from_value(config).unwrap(), "w@here", 7)
    }

    fn send(dispatcher: &mut Dispatcher, clock: &mut LamportClock, kind: &str, fields: &Value) {
        dispatcher.send(clock, kind, fields, 1.5);
    }

    fn bodies(dispatcher: &mut Dispatcher) -> Vec<(String, Value)> {
        let mut found = Vec::new();
        while let Some(batch) = dispatcher.take() {
            found.push((batch.routing_key.clone(), serde_json::from_str(batch.body()).unwrap()));
            dispatcher.confirmed();
        }
        found
    }

    #[test]
    fn an_event_has_the_common_fields_and_the_clock_and_task_events_come_in_lists() {
        let (mut events, mut clock) = (dispatcher(true), LamportClock::at(4));
        send(&mut events, &mut clock, "worker-online", &json!({"freq": 2.0}));
        send(&mut events, &mut clock, "task-started", &json!({"uuid": "a"}));
        send(&mut events, &mut clock, "task-succeeded", &json!({"uuid": "a", "result": "é\"\n"}));
        send(&mut events, &mut clock, "custom-thing", &json!({}));
        let offset = events.offset(1.5);
        let common = |kind: &str, clock: u64, own: Value| {
            let mut event = json!({
                "type": kind, "timestamp": 1.5, "hostname": "w@here", "pid": 7, "utcoffset": offset, "clock": clock,
            });
            event.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
            event
        };
        assert_eq!(
            bodies(&mut events),
            [
                ("worker.online".to_owned(), common("worker-online", 5, json!({"freq": 2.0}))),
                (
                    "task.multi".to_owned(),
                    json!([
                        common("task-started", 6, json!({"uuid": "a"})),
                        common("task-succeeded", 7, json!({"uuid": "a", "result": "é\"\n"})),
                    ])
                ),
                ("custom.thing".to_owned(), common("custom-thing", 8, json!({}))),
            ]
        );
    }

    #[test]
    fn a_list_is_full_with_twenty_four() {
        let (mut events, mut clock) = (dispatcher(true), LamportClock::default());
        for number in 0..30 {
            send(&mut events, &mut clock, "task-started", &json!({"uuid": number.to_string()}));
        }
        let lengths: Vec<usize> =
            bodies(&mut events).iter().map(|(_, body)| body.as_array().unwrap().len()).collect();
        assert_eq!(lengths, [24, 6]);
    }

    #[test]
    fn groups_are_switched_as_celery_switches_them() {
        let mut events = dispatcher(false);
        assert!(events.wants("worker") && !events.wants("task") && !events.wants("custom"));
        assert!(!events.disable_tasks());
        assert!(events.enable_tasks() && !events.enable_tasks() && events.wants("task"));
        assert!(events.disable_tasks() && !events.wants("task"));
        // Started with -E all groups are sent, and disable_events changes nothing.
        let mut all = dispatcher(true);
        assert!(!all.enable_tasks() && !all.disable_tasks() && all.wants("task") && all.wants("custom"));
        all.config.enabled = false;
        assert!(!all.wants("task"));
    }

    #[test]
    fn what_the_broker_does_not_take_is_bounded_and_the_oldest_go_first() {
        let (mut events, mut clock) = (dispatcher(true), LamportClock::default());
        let text = "x".repeat(MOST_WAITING / 8);
        for number in 0..20 {
            send(&mut events, &mut clock, "custom-big", &json!({"number": number, "text": text}));
        }
        assert!(events.bytes <= MOST_WAITING);
        let kept = events.waiting.len() as u64;
        assert_eq!((kept, events.dropped()), (7, 13));
        let (first, second) = (events.take().unwrap(), events.take().unwrap());
        assert!(first.body().contains("\"number\":13"));
        events.again(second.clone());
        events.again(first.clone());
        assert_eq!((events.take().unwrap(), events.take().unwrap()), (first, second));
    }

    #[test]
    fn only_a_few_messages_are_on_their_way_at_a_time_and_one_where_the_app_writes_them() {
        let (mut events, mut clock) = (dispatcher(true), LamportClock::default());
        for _ in 0..20 {
            send(&mut events, &mut clock, "custom-thing", &json!({}));
        }
        assert_eq!(std::iter::from_fn(|| events.take()).count(), MOST_UNCONFIRMED);
        events.confirmed();
        assert!(events.take().is_some() && events.take().is_none());
        events.unconfirmed = 0;
        events.config.serializer = "pickle".to_owned();
        assert!(events.take().is_some() && events.take().is_none());
    }
}
