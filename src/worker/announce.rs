//! Events leave the worker: which one when is decided in [`super::told`], how they travel in
//! [`crate::cluster::events`]; here they meet the loop.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::consumer::Consumer;
use super::hooks::{Notice, Report};
use super::request::Request;
use super::told::{self, Account, TaskEvent};
use crate::broker::{Command, Settlement};
use crate::clock;
use crate::cluster::events::{Batch, Dispatcher};
use crate::cluster::heartbeat::{self, Heartbeat};
use crate::error::{BrokerError, back_off};
use crate::protocol::{Kind, time};

/// Waits between attempts while the broker takes nothing.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How long the app may take for the last ones, where it has to write them.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// What became of a message with events.
pub(super) enum Announced {
    /// The app has written it; none: it cannot.
    Written(Batch, Option<Value>),
    /// The broker's word; none: the session ended without one.
    Told(Batch, Option<Result<(), BrokerError>>),
}

/// Events of the worker and what is on its way.
pub(super) struct Events {
    pub(super) dispatcher: Option<Dispatcher>,
    pub(super) sending: FuturesUnordered<BoxFuture<'static, Announced>>,
    failures: u32,
    /// Until then nothing is sent: the broker did not take the last.
    paused: Option<Instant>,
    /// When the next heartbeat is due.
    next_beat: Option<Instant>,
}

impl Events {
    pub(super) fn new(dispatcher: Option<Dispatcher>) -> Self {
        Self { dispatcher, sending: FuturesUnordered::new(), failures: 0, paused: None, next_beat: None }
    }

    /// When something is to be done.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.next_beat.into_iter().chain(self.paused).min()
    }
}

/// A task event with the id of its task.
#[derive(Serialize)]
struct Told<'a> {
    uuid: &'a str,
    #[serde(flatten)]
    event: &'a TaskEvent,
}

impl Consumer {
    /// Whether events of a task leave.
    pub(super) fn tells_tasks(&self) -> bool {
        self.events.dispatcher.as_ref().is_some_and(|dispatcher| dispatcher.wants("task"))
    }

    /// Sends an event.
    pub(super) fn tell_event(&mut self, kind: &str, fields: &impl Serialize) {
        if let Some(dispatcher) = &mut self.events.dispatcher {
            dispatcher.send(&mut self.clock, kind, fields, clock::now());
        }
    }

    /// Sends task events, where the task's are sent.
    pub(super) fn tell_task(&mut self, uuid: &str, sends: bool, events: &[TaskEvent]) {
        if sends {
            for event in events {
                self.tell_event(event.kind(), &Told { uuid, event });
            }
        }
    }

    /// The worker has a task.
    pub(super) fn tell_received(&mut self, request: &Request) {
        if !request.policy.send_events || !self.tells_tasks() {
            return;
        }
        let moment = |value: &Option<Value>| time::isoformat(value.as_ref()?, &self.rules.zone);
        let (eta, expires) = (moment(&request.headers.eta), moment(&request.headers.expires));
        let event = TaskEvent::received(&request.headers, eta, expires);
        self.tell_task(&request.headers.id, true, &[event]);
    }

    /// What the parent accounted for.
    pub(super) fn tell_incident(&mut self, report: &Subject, account: &Account, settled: Option<Settlement>) {
        let sends = report.sends || told::leaves_always(&report.incident);
        let events = told::of_incident(&report.incident, &account.became, settled);
        self.tell_task(&report.uuid, sends, &events);
    }

    /// Whom a report is about.
    pub(super) fn subject(&self, report: &Report) -> Subject {
        let (uuid, task) = match report.message.kind() {
            Kind::Task(headers) => (headers.id, headers.task),
            Kind::Malformed(_) | Kind::Bodied => Default::default(),
        };
        let policy = self.rules.tasks.get(&task);
        let sends = !uuid.is_empty() && policy.is_some_and(|policy| policy.send_events);
        Subject { uuid, sends, incident: report.what.clone() }
    }

    /// Hands events to the broker, as many as may be on their way. Once a turn: a lone one does not wait.
    pub(super) fn announce(&mut self) {
        if !self.link.is_up() || self.events.paused.is_some() {
            return;
        }
        while let Some(batch) = self.events.dispatcher.as_mut().and_then(Dispatcher::take) {
            self.send_events(batch);
        }
    }

    /// Hands over all that is left, at the end, when the loop does not do it any more.
    pub(super) async fn announce_rest(&mut self) {
        if let Some(dispatcher) = &mut self.events.dispatcher {
            dispatcher.release();
        }
        self.events.paused = None;
        self.announce();
        let until = Instant::now() + LAST_WAIT;
        // What the app still has to write. The broker's word is not waited for: the link sees to it.
        while self
            .events
            .dispatcher
            .as_ref()
            .is_some_and(|dispatcher| dispatcher.config().serializer != "json")
            && let Ok(Some(announced)) = tokio::time::timeout_at(until, self.events.sending.next()).await
        {
            self.on_announced(announced);
            self.announce();
            self.link.flush();
        }
    }

    fn send_events(&mut self, batch: Batch) {
        let Some(dispatcher) = &self.events.dispatcher else { return };
        let serializer = &dispatcher.config().serializer;
        if serializer == "json" {
            return self.publish_events(batch, None);
        }
        let hooks = self.hooks.clone();
        let arguments = json!({"serializer": serializer, "body": batch.body()});
        self.events.sending.push(Box::pin(async move {
            let written = hooks.control("celeriac.seal", arguments).await;
            Announced::Written(batch, written)
        }));
    }

    fn publish_events(&mut self, batch: Batch, written: Option<(Bytes, String, String)>) {
        let Some(dispatcher) = &self.events.dispatcher else { return };
        let (answer, answered) = oneshot::channel();
        self.link.send(Command::Publish(Box::new(dispatcher.publication(&batch, written)), answer));
        self.events.sending.push(Box::pin(async move { Announced::Told(batch, answered.await.ok()) }));
    }

    pub(super) fn on_announced(&mut self, announced: Announced) {
        let Some(dispatcher) = &mut self.events.dispatcher else { return };
        match announced {
            Announced::Written(batch, written) => {
                let text = |name: &str| written.as_ref()?.get(name)?.as_str().map(str::to_owned);
                let body = text("body").and_then(|body| BASE64.decode(body).ok());
                match (body, text("content_type"), text("content_encoding")) {
                    (Some(body), Some(kind), Some(encoding)) => {
                        self.publish_events(batch, Some((body.into(), kind, encoding)));
                    }
                    _ => dispatcher.refused(&batch, "event_serializer cannot write them"),
                }
            }
            Announced::Told(_, Some(Ok(()))) => {
                self.events.failures = 0;
                dispatcher.confirmed();
            }
            Announced::Told(batch, Some(Err(error))) if !error.is_retryable() => {
                dispatcher.refused(&batch, error.reason());
            }
            Announced::Told(batch, _) => {
                dispatcher.again(batch);
                if self.events.paused.is_none() {
                    self.events.failures = self.events.failures.saturating_add(1);
                    let wait = back_off(self.events.failures, FIRST_WAIT, LONGEST_WAIT);
                    self.events.paused = Some(Instant::now() + wait);
                }
            }
        }
    }

    // --- heartbeats ------------------------------------------------------------------------------------

    /// The worker is there, or there again: tells so, and of its health from now on.
    pub(super) fn begin_to_beat(&mut self) {
        if self.config.heartbeat.is_some() {
            self.beat("worker-online");
            self.beat_later();
        }
    }

    pub(super) fn beat_if_due(&mut self) {
        self.events.paused.take_if(|until| Instant::now() >= *until);
        if self.events.next_beat.is_some_and(|at| Instant::now() >= at) {
            self.beat_later();
            // Nobody needs to hear of them later.
            if self.connected {
                self.beat("worker-heartbeat");
            }
        }
    }

    fn beat_later(&mut self) {
        self.events.next_beat = self.config.heartbeat.map(|interval| Instant::now() + seconds(interval));
    }

    /// The worker leaves.
    pub(super) fn stop_beating(&mut self) {
        if self.events.next_beat.take().is_some() {
            self.beat("worker-offline");
        }
    }

    /// The heartbeat that remote control asks for.
    pub(super) fn beat_as_asked(&mut self) {
        let Some(events) = &self.config.events else { return };
        let software = events.software.clone();
        self.tell_event("worker-heartbeat", &heartbeat::Asked { freq: 5, software: &software });
    }

    fn beat(&mut self, kind: &str) {
        let Some(freq) = self.config.heartbeat else { return };
        if self.config.heartbeat_signal {
            self.hooks.notice(Notice::Heartbeat);
        }
        let Some(events) = &self.config.events else { return };
        let software = events.software.clone();
        let heartbeat = Heartbeat {
            freq,
            active: self.jobs.active().count() + self.desk.running(),
            processed: self.counts.totals().map(|(_, count)| count).sum(),
            loadavg: heartbeat::load_average(),
            software: &software,
        };
        self.tell_event(kind, &heartbeat);
    }
}

/// Whom a report is about, and what happened.
pub(super) struct Subject {
    uuid: String,
    sends: bool,
    incident: super::hooks::Incident,
}

/// As a duration; not none, or the loop would do nothing else.
pub(super) fn seconds(interval: f64) -> Duration {
    Duration::try_from_secs_f64(interval.max(0.1)).unwrap_or(Duration::MAX)
}
