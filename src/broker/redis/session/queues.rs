//! What is consumed: lists, and channels of fanout exchanges.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Live;
use crate::broker::envelope;
use crate::broker::redis::options::Order;
use crate::broker::redis::restore;
use crate::broker::redis::routes::{self, Bound};
use crate::broker::topology::{Binding, Exchange, Queue};
use crate::broker::{Control, Delivery, Event, Handle, Heard};
use crate::error::BrokerError;
use crate::protocol::{DeliveryInfo, Message};

/// A queue that is consumed.
pub(super) struct Source {
    pub(super) name: String,
    /// Its name as JSON, for the records.
    pub(super) json: String,
    /// Its lists, by priority step.
    pub(super) lists: Vec<String>,
}

/// Where broadcasts of a channel go.
#[derive(Clone, PartialEq)]
pub(super) enum Listener {
    Control,
    /// A queue bound to a fanout exchange.
    Queue(String),
    /// The same, only listened to.
    Heard(String),
}

/// A queue that is only listened to.
pub(super) struct Side {
    name: String,
    bound: Vec<Bound>,
    /// Its lists; none where it hears by pub/sub.
    lists: Vec<String>,
}

/// How often lists that are only listened to are looked at. They live for seconds.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Messages taken from such a list in one go.
const LOOK: usize = 100;

impl Live {
    pub(in crate::broker::redis) async fn consume(&mut self, queue: &Queue) -> Result<(), BrokerError> {
        let bound = routes::declare(&self.link, &self.shared, queue).await?;
        self.refresh_later(&bound);
        self.bound.extend(bound);
        let fanouts = queue.bindings.iter().filter(|binding| binding.exchange.kind == "fanout");
        let channels: Vec<String> = fanouts
            .map(|binding| {
                self.shared.keys.channel(&binding.exchange.name, &binding.routing_key.replace('#', "*"))
            })
            .collect();
        if channels.is_empty() {
            if self.sources.iter().all(|source| source.name != queue.name) {
                self.sources.push(Source {
                    name: queue.name.clone(),
                    json: serde_json::Value::from(queue.name.as_str()).to_string(),
                    lists: self.shared.keys.lists_of(&queue.name),
                });
                if self.shared.options.order == Order::Sorted {
                    self.sources.sort_by(|a, b| a.name.cmp(&b.name));
                }
            }
            self.ready = true;
        }
        for channel in channels {
            self.subscribe(channel, Listener::Queue(queue.name.clone())).await?;
        }
        Ok(())
    }

    pub(super) async fn subscribe(&mut self, channel: String, listener: Listener) -> Result<(), BrokerError> {
        let subscriber = match self.subscriber.take() {
            Some(link) => link,
            None => self.dialer.connect().await?,
        };
        self.subscriber.insert(subscriber).subscribe(&channel).await?;
        let listeners = self.listeners.entry(channel).or_default();
        if !listeners.contains(&listener) {
            listeners.push(listener);
        }
        Ok(())
    }

    pub(super) async fn cancel(&mut self, name: &str) -> Result<(), BrokerError> {
        self.sources.retain(|source| source.name != name);
        self.bound.retain(|bound| bound.queue != name);
        self.silence(&Listener::Queue(name.to_owned())).await
    }

    async fn silence(&mut self, listener: &Listener) -> Result<(), BrokerError> {
        let mut silent = Vec::new();
        for (channel, listeners) in &mut self.listeners {
            listeners.retain(|other| other != listener);
            if listeners.is_empty() {
                silent.push(channel.clone());
            }
        }
        for channel in silent {
            self.listeners.remove(&channel);
            if let Some(subscriber) = &self.subscriber {
                subscriber.unsubscribe(&channel).await?;
            }
        }
        Ok(())
    }

    /// Listens to remote control, as kombu's mailbox: a queue of the node's, bound to a fanout exchange.
    pub(in crate::broker::redis) async fn listen(
        &mut self,
        node: &str,
        control: &Control,
    ) -> Result<(), BrokerError> {
        let exchange = format!("{}.pidbox", control.exchange);
        let mut queue = Queue::named(&format!("{node}.{exchange}"));
        let channel = self.shared.keys.channel(&exchange, "");
        let exchange =
            Exchange { name: exchange, kind: "fanout".to_owned(), ..queue.bindings[0].exchange.clone() };
        queue.bindings =
            vec![Binding { exchange, routing_key: String::new(), arguments: serde_json::Map::new() }];
        if let Some(expires) = control.queue_expires {
            queue.arguments.insert("x-expires".to_owned(), (expires * 1000.0).into());
        }
        let bound = routes::declare(&self.link, &self.shared, &queue).await?;
        self.refresh_later(&bound);
        self.control = bound.first().cloned();
        self.bound.extend(bound);
        self.subscribe(channel, Listener::Control).await
    }

    /// Listens to a queue; see [`crate::broker::Command::Listen`].
    pub(super) async fn hark(&mut self, queue: &Queue) -> Result<(), BrokerError> {
        let bound = routes::declare(&self.link, &self.shared, queue).await?;
        self.refresh_later(&bound);
        self.bound.extend(bound.iter().cloned());
        let mut lists = self.shared.keys.lists_of(&queue.name);
        for binding in queue.bindings.iter().filter(|binding| binding.exchange.kind == "fanout") {
            lists.clear();
            let key = binding.routing_key.replace('#', "*");
            let channel = self.shared.keys.channel(&binding.exchange.name, &key);
            self.subscribe(channel, Listener::Heard(queue.name.clone())).await?;
        }
        self.sides.push(Side { name: queue.name.clone(), bound, lists });
        Ok(())
    }

    /// Listens to a queue no more, and deletes it.
    pub(super) async fn deafen(&mut self, name: &str) -> Result<(), BrokerError> {
        self.silence(&Listener::Heard(name.to_owned())).await?;
        self.bound.retain(|bound| bound.queue != name);
        if let Some(index) = self.sides.iter().position(|side| side.name == name) {
            for bound in self.sides.swap_remove(index).bound {
                bound.delete(&self.link, &self.shared).await?;
            }
        }
        Ok(())
    }

    /// Deletes all that is only listened to.
    pub(super) async fn deafen_all(&mut self) -> Result<(), BrokerError> {
        for name in self.sides.iter().map(|side| side.name.clone()).collect::<Vec<_>>() {
            self.deafen(&name).await?;
        }
        Ok(())
    }

    /// Whether there are lists to look at.
    pub(super) fn listens_to_lists(&self) -> bool {
        self.sides.iter().any(|side| !side.lists.is_empty())
    }

    /// Takes what has come into lists that are only listened to.
    pub(super) async fn look(&mut self) -> Result<(), BrokerError> {
        self.next_look = Instant::now() + LOOK_EVERY;
        let lists = self.sides.iter().flat_map(|side| side.lists.iter().map(|list| (&side.name, list)));
        for (name, list) in lists.map(|(name, list)| (name.clone(), list.clone())).collect::<Vec<_>>() {
            let mut take = redis::cmd("RPOP");
            take.arg(&list).arg(LOOK);
            let payloads: Option<Vec<Vec<u8>>> = self.link.query(&take).await?;
            for payload in payloads.unwrap_or_default() {
                match envelope::read(&payload, &name) {
                    Ok((message, info)) => self.heard(&name, message, info),
                    Err(error) => {
                        tracing::warn!(target: "kombu.transport.redis", queue = name, %error, "A message makes no sense.");
                    }
                }
            }
        }
        Ok(())
    }

    fn heard(&mut self, queue: &str, message: Message, info: DeliveryInfo) {
        self.emit(Event::Heard(Heard { queue: queue.to_owned(), routing_key: info.routing_key, message }));
    }

    pub(super) fn refresh_later(&mut self, bound: &[Bound]) {
        if let Some(interval) = bound.iter().filter_map(Bound::interval).min() {
            let at = Instant::now() + interval;
            self.refresh_at = Some(self.refresh_at.map_or(at, |before| before.min(at)));
        }
    }

    pub(super) fn on_broadcast(&mut self, channel: &str, payload: Bytes) {
        // None: cancelled a moment ago.
        for listener in self.listeners.get(channel).cloned().unwrap_or_default() {
            let queue = match &listener {
                Listener::Control => "",
                Listener::Queue(queue) | Listener::Heard(queue) => queue.as_str(),
            };
            match envelope::read(&payload, queue) {
                Err(error) => {
                    let preview = restore::preview(&payload);
                    tracing::warn!(target: "kombu.transport.redis", channel, %error, preview,
                        "Cannot process event on channel.");
                }
                Ok((message, _)) if listener == Listener::Control => self.emit(Event::Control(message)),
                Ok((message, info)) if matches!(listener, Listener::Heard(_)) => {
                    self.heard(queue, message, info);
                }
                Ok((message, info)) => {
                    let tag = self.shared.tags(1);
                    self.shared.fleeting().insert(tag);
                    let handle = Handle::new(tag);
                    self.emit(Event::Deliveries(vec![Delivery { message, info, handle }]));
                }
            }
        }
    }
}
