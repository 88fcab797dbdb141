//! AMQP 0-9-1 (RabbitMQ), spoken with lapin.
//!
//! A session is one connection that consumes, on a channel for tasks and one for remote control, and a second
//! one that publishes ([`publish`]), made when it is first needed. A session that loses anything of this ends
//! as a whole; lapin's own recovery is off.

pub(crate) mod address;
mod connect;
mod consumers;
mod fault;
mod frames;
mod message;
pub(crate) mod publish;
mod session;
mod settle;
mod sides;
mod table;
mod tls;
mod topology;
mod transport;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::{
    Broker, BrokerConfig, COMMAND_CAPACITY, Capabilities, Consume, Control, EVENT_CAPACITY, Session,
};
use crate::error::BrokerError;
use address::Address;
use connect::Link;
use consumers::{Consumers, Scope};
use fault::{Fault, short};

/// Longest time that declaring and consuming all queues may take once the connection stands.
const START_WITHIN: Duration = Duration::from_secs(120);

/// RabbitMQ, or whatever else speaks AMQP 0-9-1.
pub struct Amqp {
    address: Address,
    /// Sessions so far; numbers them.
    sessions: AtomicU64,
    /// Whether the queue of remote control was ours once: a locked one is then our own ghost.
    was_in_control: AtomicBool,
}

impl Amqp {
    /// The broker at an address. `None`: the scheme is not AMQP.
    ///
    /// # Errors
    /// [`BrokerError::Address`] when the scheme is AMQP and the address or an option is wrong.
    pub fn new(url: &str, config: &BrokerConfig) -> Result<Option<Arc<Self>>, BrokerError> {
        let Some(address) = Address::parse(url, config)? else { return Ok(None) };
        Ok(Some(Arc::new(Self {
            address,
            sessions: AtomicU64::new(0),
            was_in_control: AtomicBool::new(false),
        })))
    }

    /// Declares everything and starts the consumers.
    async fn start(
        &self,
        link: &Link,
        consume: &Consume,
    ) -> Result<(Channel, Consumers, Option<(Channel, Consumer)>), BrokerError> {
        let starting = |fault: Fault| fault.starting(&self.address);
        // Control first: a second worker of the same name must not take tasks.
        let control = match &consume.control {
            Some(control) => Some(self.control(link, &consume.node, control).await?),
            None => None,
        };
        let channel = link.channel().await.map_err(starting)?;
        let scope = if consume.queues.iter().any(|queue| queue.is_quorum()) {
            tracing::info!(target: "celery.worker.consumer", "Global QoS is disabled: prefetch is counted per consumer.");
            Scope::Consumer
        } else if link.counts_per_channel() {
            Scope::Channel
        } else {
            Scope::Consumer
        };
        let consumers = Consumers::new(channel.clone(), &consume.node, consume.prefetch, scope).await;
        let mut consumers = consumers.map_err(starting)?;
        for queue in &consume.queues {
            topology::declare(&channel, queue).await.map_err(starting)?;
            consumers.add(queue.clone()).await.map_err(starting)?;
        }
        Ok((channel, consumers, control))
    }

    async fn control(
        &self,
        link: &Link,
        node: &str,
        control: &Control,
    ) -> Result<(Channel, Consumer), BrokerError> {
        let queue = topology::control_queue(node, control);
        let outcome: Result<_, Fault> = async {
            let channel = link.channel().await?;
            topology::declare(&channel, &queue).await?;
            let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
            let consumer = channel
                .basic_consume(short(&queue.name)?, short("control")?, options, FieldTable::default())
                .await?;
            Ok((channel, consumer))
        }
        .await;
        match outcome {
            Ok(control) => {
                self.was_in_control.store(true, Ordering::Relaxed);
                Ok(control)
            }
            // The broker has not yet noticed that our last connection is gone.
            Err(fault) if fault.is_locked() && self.was_in_control.load(Ordering::Relaxed) => {
                Err(self.address.lost(fault))
            }
            Err(fault) if fault.is_locked() => Err(self.address.refused(format!(
                "another worker named {node} is connected, or its connection lingers: {fault}; give each worker \
                 a node name of its own (-n)"
            ))),
            Err(fault) => Err(fault.starting(&self.address)),
        }
    }
}

#[async_trait]
impl Broker for Amqp {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            settles_across_sessions: false,
            parks: false,
            fanout: true,
            remembers: false,
            listens: true,
        }
    }

    fn address(&self) -> String {
        self.address.masked()
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        let link =
            Link::open(&self.address, &consume.node).await.map_err(|fault| fault.starting(&self.address))?;
        let (channel, consumers, control) = tokio::time::timeout(START_WITHIN, self.start(&link, consume))
            .await
            .map_err(|_| self.address.lost("no answer to the declarations"))??;

        let (event_sender, events) = mpsc::channel(EVENT_CAPACITY);
        let (commands, command_receiver) = mpsc::channel(COMMAND_CAPACITY);
        let (publisher, publications) = mpsc::channel(publish::PUBLISH_CAPACITY);
        let (done, published) = oneshot::channel();
        let mut tasks = JoinSet::new();
        let name = format!("{} (publisher)", consume.node);
        let publishing = publish::Publisher::new(vec![self.address.clone()], name, publications).run();
        tasks.spawn(async move {
            publishing.await;
            // A session that is gone does not wait for it.
            let _ = done.send(());
        });
        tasks.spawn(session::run(session::Live {
            address: self.address.clone(),
            number: self.sessions.fetch_add(1, Ordering::Relaxed) + 1,
            link,
            channel,
            consumers,
            control,
            sides: sides::Sides::default(),
            publisher,
            published,
            events: event_sender,
            commands: command_receiver,
        }));
        Ok(Session { events, commands, tasks })
    }
}
