//! The consumers of one session: what they deliver as one stream, and how many deliveries the broker may have
//! outstanding with us.

use std::task::Poll;

use futures_util::stream::{BoxStream, SelectAll};
use futures_util::{StreamExt, stream};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::ShortString;

use super::fault::{Fault, short};
use super::{table, topology};
use crate::broker::topology::Queue;

/// Deliveries that go up as one event, at most: what is ready is taken, nothing is waited for.
const BATCH: usize = 256;

/// What the consumers say.
pub(super) enum Heard {
    /// Deliveries with the names of their queues, in the order in which they came.
    Deliveries(Vec<(Delivery, usize)>),
    /// The consumers can deliver no more.
    Failed(String),
    /// The worker has dropped the session.
    Nobody,
}

enum Item {
    Delivery(Delivery),
    Failed(Fault),
    Ended,
}

/// A queue that was consumed at some time of this session.
struct Source {
    queue: Queue,
    /// Its consumer's number and tag; none once it was cancelled.
    consumer: Option<(usize, ShortString)>,
}

/// Whose item it is: the index of the source, the number of the consumer.
type Origin = (usize, usize);

/// All consumers of tasks; they share a channel, and so one count of what is outstanding.
pub(super) struct Consumers {
    channel: Channel,
    node: String,
    sources: Vec<Source>,
    streams: SelectAll<BoxStream<'static, (Origin, Item)>>,
    /// Consumers made so far; numbers their tags.
    made: usize,
    prefetch: u32,
    scope: Scope,
}

/// What `basic.qos` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All that is outstanding on the channel.
    Channel,
    /// What is outstanding with one consumer; fixed when the consumer is made.
    Consumer,
}

impl Consumers {
    pub(super) fn new(channel: Channel, node: &str, prefetch: u32, scope: Scope) -> Self {
        Self {
            channel,
            node: node.to_owned(),
            sources: Vec::new(),
            streams: SelectAll::new(),
            made: 0,
            prefetch,
            scope,
        }
    }

    /// Tells the broker how much may be outstanding. Where the count is per consumer it holds for consumers made later.
    pub(super) async fn limit(&mut self, prefetch: u32) -> Result<(), Fault> {
        self.prefetch = prefetch;
        let count = u16::try_from(prefetch).unwrap_or_else(|_| {
            tracing::warn!(
                target: "celery.worker.consumer",
                prefetch,
                "QoS: Disabled: prefetch_count exceeds 65535"
            );
            0
        });
        let options = BasicQosOptions { global: self.scope == Scope::Channel };
        Ok(self.channel.basic_qos(count, options).await?)
    }

    /// What `basic.qos` counts in this session.
    pub(super) fn scope(&self) -> Scope {
        self.scope
    }

    /// Declares a queue and consumes it, unless it is being consumed.
    pub(super) async fn add(&mut self, queue: Queue) -> Result<(), Fault> {
        if self.sources.iter().any(|source| source.consumer.is_some() && source.queue.name == queue.name) {
            return Ok(());
        }
        topology::declare(&self.channel, &queue).await?;
        if queue.is_quorum() && self.scope == Scope::Channel {
            self.count_per_consumer().await?;
        }
        let index = self.sources.len();
        self.sources.push(Source { queue, consumer: None });
        self.consume(index).await
    }

    async fn consume(&mut self, index: usize) -> Result<(), Fault> {
        self.made += 1;
        let queue = &self.sources[index].queue;
        let options = BasicConsumeOptions { no_ack: queue.no_ack, ..BasicConsumeOptions::default() };
        // The node's name helps operators; a long one is cut at AMQP's limit.
        let node: String = self.node.chars().take(48).collect();
        let consumer = self
            .channel
            .basic_consume(
                short(&queue.name)?,
                short(&format!("{node}-{}", self.made))?,
                options,
                table::from_json(&queue.consumer_arguments),
            )
            .await?;
        let origin = (index, self.made);
        self.sources[index].consumer = Some((self.made, consumer.tag()));
        let items = consumer.map(move |item| match item {
            Ok(delivery) => (origin, Item::Delivery(delivery)),
            Err(error) => (origin, Item::Failed(error.into())),
        });
        self.streams.push(items.chain(stream::once(async move { (origin, Item::Ended) })).boxed());
        Ok(())
    }

    /// A quorum queue does not allow a count for the whole channel: all consumers are made anew with their own.
    async fn count_per_consumer(&mut self) -> Result<(), Fault> {
        let active: Vec<_> =
            (0..self.sources.len()).filter(|index| self.sources[*index].consumer.is_some()).collect();
        for index in &active {
            self.cancel_one(*index).await?;
        }
        self.channel.basic_qos(0, BasicQosOptions { global: true }).await?;
        self.scope = Scope::Consumer;
        self.limit(self.prefetch).await?;
        for index in active {
            self.consume(index).await?;
        }
        Ok(())
    }

    /// Stops consuming a queue. What it delivered before is still to be settled.
    pub(super) async fn cancel(&mut self, name: &str) -> Result<(), Fault> {
        for index in 0..self.sources.len() {
            if self.sources[index].queue.name == name {
                self.cancel_one(index).await?;
            }
        }
        Ok(())
    }

    /// Stops consuming all queues.
    pub(super) async fn cancel_all(&mut self) -> Result<(), Fault> {
        for index in 0..self.sources.len() {
            self.cancel_one(index).await?;
        }
        Ok(())
    }

    async fn cancel_one(&mut self, index: usize) -> Result<(), Fault> {
        match self.sources[index].consumer.take() {
            Some((_, tag)) => Ok(self.channel.basic_cancel(tag, BasicCancelOptions::default()).await?),
            None => Ok(()),
        }
    }

    /// The name of a queue, by the index of a delivery.
    pub(super) fn queue(&self, index: usize) -> &Queue {
        &self.sources[index].queue
    }

    /// Waits for deliveries and takes all that are there.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped before it is ready: what was taken is handed out at once.
    pub(super) async fn next(&mut self) -> Heard {
        loop {
            let Some(first) = self.streams.next().await else {
                // No consumers at all: somebody else must wake us.
                return std::future::pending().await;
            };
            let mut batch = Vec::new();
            let mut item = Some(first);
            while let Some(((index, number), heard)) = item {
                match heard {
                    Item::Delivery(delivery) => batch.push((delivery, index)),
                    Item::Failed(fault) => return Heard::Failed(fault.to_string()),
                    // A consumer that we have cancelled is not there any more, or another is in its place.
                    Item::Ended
                        if self.sources[index]
                            .consumer
                            .as_ref()
                            .is_some_and(|(current, _)| *current == number) =>
                    {
                        let name = &self.sources[index].queue.name;
                        return Heard::Failed(format!("the broker cancelled the consumer of queue {name:?}"));
                    }
                    Item::Ended => {}
                }
                if batch.len() >= BATCH {
                    break;
                }
                item = match futures_util::poll!(self.streams.next()) {
                    Poll::Ready(item) => item,
                    Poll::Pending => None,
                };
            }
            if !batch.is_empty() {
                return Heard::Deliveries(batch);
            }
        }
    }
}
