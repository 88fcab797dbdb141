//! The worker among others: it asks them what they know when it comes ([`crate::cluster::mingle`]), hears of them
//! ([`crate::cluster::gossip`]), and never waits for any of it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

use super::announce::seconds;
use super::asking::{Asked, JSON};
use super::consumer::Consumer;
use super::hooks::Notice;
use crate::broker::topology::{Binding, Exchange, Queue};
use crate::broker::{Command, Heard, Publication};
use crate::cluster::gossip::{self, Gossip, Step};
use crate::cluster::mingle::{ANSWERS_WITHIN, Mingle};
use crate::control::Panel;
use crate::protocol::{Json, Message, repr};

const MINGLE: &str = "celery.worker.consumer.mingle";
const GOSSIP: &str = "celery.worker.consumer.gossip";
const ANSWERS: &str = "reply.celery.pidbox";

/// What the worker knows of others.
pub(super) struct Neighbours {
    gossip: Option<Gossip>,
    /// The queue by which they are heard, in this session.
    ear: Option<String>,
    /// A question that was asked, and when the answers are in.
    mingle: Option<(Mingle, Instant)>,
    next_look: Option<Instant>,
}

impl Neighbours {
    pub(super) fn new(hostname: &str, gossips: bool) -> Self {
        let gossip = gossips.then(|| Gossip::new(hostname, std::process::id()));
        Self { gossip, ear: None, mingle: None, next_look: None }
    }

    /// When something is to be done.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let answers = self.mingle.as_ref().map(|(_, until)| *until);
        answers.into_iter().chain(self.next_look).min()
    }
}

impl Consumer {
    /// A connection is there: listens to the others, and asks them.
    pub(super) fn meet_neighbours(&mut self) {
        let cluster = self.config.cluster.clone();
        let wanted = cluster.mingle || cluster.gossip.is_some();
        if !self.link.broker().capabilities().listens {
            if wanted {
                tracing::warn!(
                    target: GOSSIP,
                    "This connection to the broker cannot listen to other workers: no gossip, no mingle."
                );
            }
            return;
        }
        if let Some(mut queue) = cluster.gossip {
            queue.name = format!("{}.{}", queue.name, Uuid::new_v4());
            self.neighbours.ear = Some(queue.name.clone());
            self.neighbours.next_look = Some(Instant::now() + Duration::from_secs_f64(gossip::LOOK_EVERY));
            self.link.send(Command::Listen(Box::new(queue)));
        }
        if cluster.mingle {
            self.mingle();
        }
    }

    // --- mingle ----------------------------------------------------------------------------------------

    fn mingle(&mut self) {
        tracing::info!(target: MINGLE, "mingle: searching for neighbors");
        let mingle = Mingle::new(&self.config.hostname);
        let control = self.config.control.as_ref();
        let expires = control.and_then(|control| control.queue_expires).unwrap_or(10.0);
        // RabbitMQ takes whole numbers only.
        let expires = u64::try_from(seconds(expires).as_millis()).unwrap_or(u64::MAX);
        let pidbox = format!("{}.pidbox", control.map_or("celery", |control| control.exchange.as_str()));
        let exchange = Exchange {
            name: ANSWERS.to_owned(),
            kind: "direct".to_owned(),
            durable: false,
            auto_delete: false,
            passive: false,
            no_declare: false,
            arguments: Map::new(),
        };
        let routing_key = mingle.routing_key().to_owned();
        let queue = Queue {
            durable: false,
            auto_delete: true,
            no_ack: true,
            bindings: vec![Binding { exchange, routing_key, arguments: Map::new() }],
            arguments: Map::from_iter([("x-expires".to_owned(), json!(expires))]),
            ..Queue::named(&mingle.queue(ANSWERS))
        };
        self.link.send(Command::Listen(Box::new(queue)));
        let question = mingle.question(ANSWERS, self.revoked.ids());
        let clock = self.clock.forward();
        self.neighbours.mingle = Some((mingle, Instant::now() + Duration::from_secs_f64(ANSWERS_WITHIN)));
        self.reply(Box::new(Publication {
            exchange: pidbox,
            exchange_type: Some("fanout".to_owned()),
            routing_key: String::new(),
            message: Message {
                content_type: Some(JSON.to_owned()),
                content_encoding: Some("utf-8".to_owned()),
                headers: Json::of(&json!({"clock": clock, "expires": 0})),
                properties: Json::of(&json!({"delivery_mode": 1, "priority": 0})),
                body: Bytes::from(question.to_string()),
            },
            declare: None,
        }));
    }

    fn mingled(&mut self, mingle: Mingle) {
        self.link.send(Command::Deafen(mingle.queue(ANSWERS)));
        let Some(news) = mingle.conclude() else {
            tracing::info!(target: MINGLE, "mingle: all alone");
            return;
        };
        tracing::info!(target: MINGLE, "mingle: sync with {} nodes", news.len());
        for (node, news) in news {
            tracing::debug!(target: MINGLE, "mingle: processing reply from {node}");
            match news.clock {
                Some(clock) => self.clock.adjust(clock),
                None => self.clock.forward(),
            };
            let unknown: Vec<String> =
                news.revoked.into_iter().filter(|id| !self.revoked.contains(id)).collect();
            if !unknown.is_empty() {
                self.revoke(&unknown);
            }
        }
        tracing::info!(target: MINGLE, "mingle: sync complete");
    }

    // --- what is heard ---------------------------------------------------------------------------------

    pub(super) fn on_heard(&mut self, heard: Heard) {
        // On Redis without patterns every event comes this way.
        if heard.routing_key.starts_with("task.") {
            return;
        }
        if heard.message.content_type.as_deref() == Some(JSON) {
            match serde_json::from_slice(&heard.message.body) {
                Ok(body) => self.overheard(&heard.queue, &body),
                Err(error) => tracing::error!(target: GOSSIP, "Cannot decode message: {error}"),
            }
            return;
        }
        let sealed = json!({
            "content_type": heard.message.content_type,
            "content_encoding": heard.message.content_encoding,
            "body": BASE64.encode(&heard.message.body),
        });
        let hooks = self.hooks.clone();
        self.asking.spawn(async move {
            let opened = hooks.control("celeriac.overhear", sealed).await;
            Asked::Overheard(heard.queue, opened)
        });
    }

    /// What was heard, decoded.
    pub(super) fn overheard(&mut self, queue: &str, body: &Value) {
        if let Some((mingle, _)) = &mut self.neighbours.mingle
            && mingle.queue(ANSWERS) == queue
        {
            mingle.hear(body);
        } else if self.neighbours.ear.as_deref() == Some(queue) {
            let now = self.uptime();
            let steps = self.neighbours.gossip.as_mut().map(|gossip| gossip.hear(body, now));
            steps.into_iter().flatten().for_each(|step| self.gossip(step));
        }
    }

    fn gossip(&mut self, step: Step) {
        match step {
            Step::Adjust(clock) => {
                self.clock.adjust(clock);
            }
            Step::Forward => {
                self.clock.forward();
            }
            Step::Joined(event) => {
                tracing::debug!(target: GOSSIP, "{} joined the party", name(&event));
                self.hooks.notice(Notice::Neighbour { event, missed: false });
            }
            Step::Left(event) => {
                tracing::debug!(target: GOSSIP, "{} left", name(&event));
                self.hooks.notice(Notice::Neighbour { event, missed: false });
            }
            Step::Vote(id) => self.tell_event("worker-elect-ack", &json!({"id": id})),
            Step::Won(ballot) => {
                tracing::info!(target: GOSSIP, "I won the election {}", repr::repr(&ballot.id));
                let arguments = json!({"topic": ballot.topic, "action": ballot.action});
                let (hooks, topic) = (self.hooks.clone(), ballot.topic);
                self.asking.spawn(async move {
                    if hooks.control("celeriac.elected", arguments).await.is_none() {
                        tracing::error!(target: GOSSIP, "Unknown election topic {}", repr::repr(&topic));
                    }
                    Asked::Answered(None, None)
                });
            }
            Step::Elected { id, leader } => {
                tracing::info!(target: GOSSIP, "node {leader} elected for {}", repr::repr(&id));
            }
            Step::Odd(reason) => tracing::error!(target: GOSSIP, "{reason}"),
        }
    }

    /// Has the workers elect one of them.
    pub(super) fn call_election(&mut self, id: &str, topic: &str, action: Value) {
        // As in Celery: without gossip nothing happens.
        if let Some(gossip) = &mut self.neighbours.gossip {
            gossip.stand(id);
            self.tell_event("worker-elect", &json!({"id": id, "topic": topic, "action": action, "cver": 1}));
        }
    }

    // --- time ------------------------------------------------------------------------------------------

    pub(super) fn look_for_neighbours(&mut self) {
        let now = Instant::now();
        if let Some((mingle, _)) = self.neighbours.mingle.take_if(|(_, until)| now >= *until) {
            self.mingled(mingle);
        }
        if self.neighbours.next_look.take_if(|at| now >= *at).is_none() {
            return;
        }
        self.neighbours.next_look = Some(now + Duration::from_secs_f64(gossip::LOOK_EVERY));
        // While the connection is down nobody is heard.
        if !self.connected {
            return;
        }
        let uptime = self.uptime();
        for event in self.neighbours.gossip.as_mut().map(|gossip| gossip.missed(uptime)).unwrap_or_default() {
            tracing::info!(target: GOSSIP, "missed heartbeat from {}", name(&event));
            self.hooks.notice(Notice::Neighbour { event, missed: true });
        }
    }
}

fn name(event: &Value) -> &str {
    event.get("hostname").and_then(Value::as_str).unwrap_or_default()
}
