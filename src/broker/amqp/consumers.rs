//! The consumers of one session: what they deliver as one stream, and how many deliveries the broker may have
//! outstanding with us.
//!
//! Where `basic.qos` counts for the channel (RabbitMQ 3.3 to 3.x without quorum queues) a new limit is one
//! request. Elsewhere the limit belongs to a consumer for its life, and Celery leaves it as it was: once a
//! worker holds as many tasks with an `eta` as it may prefetch, it takes nothing more. Here a consumer that has
//! become too small is made anew with the room that is left.

use std::collections::HashMap;
use std::task::Poll;

use futures_util::stream::{BoxStream, SelectAll};
use futures_util::{StreamExt, stream};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::ShortString;

use super::fault::{Fault, short};
use super::table;
use crate::broker::topology::Queue;

/// Deliveries that go up as one event, at most: what is ready is taken, nothing is waited for.
const BATCH: usize = 256;

/// Whose a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// Index of the source, see [`Consumers::queue`].
    pub(super) source: usize,
    /// Number of the consumer.
    pub(super) consumer: usize,
}

/// What the consumers say.
pub(super) enum Heard {
    /// Deliveries, in the order in which they came.
    Deliveries(Vec<(Delivery, Origin)>),
    /// The consumers can deliver no more.
    Failed(Fault),
    /// The worker has dropped the session.
    Nobody,
}

#[expect(clippy::large_enum_variant, reason = "nearly all are deliveries, and none is kept")]
enum Item {
    Delivery(Delivery),
    Failed(Fault),
    Ended,
}

/// A queue that was consumed at some time of this session.
struct Source {
    queue: Queue,
    /// Whether it is to be consumed.
    wanted: bool,
    /// Its consumer. None also while there is no room for a single delivery.
    consumer: Option<Active>,
    /// Unsettled deliveries, of all its consumers.
    held: u32,
}

/// A consumer that the broker knows.
struct Active {
    number: usize,
    tag: ShortString,
    /// Its limit, where limits belong to consumers; 0: none.
    limit: u32,
}

/// All consumers of tasks; they share a channel.
pub(super) struct Consumers {
    channel: Channel,
    node: String,
    sources: Vec<Source>,
    streams: SelectAll<BoxStream<'static, (Origin, Item)>>,
    /// Deliveries that came while a consumer was made anew; they go first.
    early: Vec<(Delivery, Origin)>,
    /// Consumers made so far; numbers them.
    made: usize,
    /// Unsettled deliveries of each consumer, also of those that are no more.
    held: HashMap<usize, u32>,
    /// Most unsettled deliveries; 0: no bound.
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

/// What is to become of a consumer that counts for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Keep,
    /// A new one, with this limit.
    Make(u32),
    /// None, until there is room.
    Drop,
}

/// Decides it. `limit` is that of the present consumer, `held` counts its source's unsettled deliveries and `own`
/// those of the present consumer among them. A new consumer costs three requests, so that a little more or less
/// room than there should be is let pass: a quarter of the prefetch count too much, half the room too little.
fn change(prefetch: u32, limit: Option<u32>, held: u32, own: u32) -> Change {
    if prefetch == 0 {
        return if limit == Some(0) { Change::Keep } else { Change::Make(0) };
    }
    let room = prefetch.saturating_sub(held);
    let fresh = if room > 0 { Change::Make(room) } else { Change::Drop };
    match limit {
        None if room == 0 => Change::Keep,
        None => fresh,
        Some(0) => fresh,
        Some(limit) => {
            let left = limit.saturating_sub(own);
            let too_small = room > left && left.saturating_mul(2) <= room;
            let too_large = limit + (held - own.min(held)) > prefetch + prefetch / 4;
            if too_small || too_large { fresh } else { Change::Keep }
        }
    }
}

impl Consumers {
    /// Consumers on this channel, none yet.
    pub(super) async fn new(
        channel: Channel,
        node: &str,
        prefetch: u32,
        scope: Scope,
    ) -> Result<Self, Fault> {
        let mut consumers = Self {
            channel,
            node: node.to_owned(),
            sources: Vec::new(),
            streams: SelectAll::new(),
            early: Vec::new(),
            made: 0,
            held: HashMap::new(),
            // Sent below, whatever it is.
            prefetch: u32::MAX,
            scope,
        };
        consumers.limit(prefetch).await?;
        Ok(consumers)
    }

    /// Changes how many deliveries may be unsettled.
    pub(super) async fn limit(&mut self, prefetch: u32) -> Result<(), Fault> {
        let count = u16::try_from(prefetch).unwrap_or_else(|_| {
            tracing::warn!(target: "celery.worker.consumer", prefetch, "QoS: Disabled: prefetch_count exceeds 65535");
            0
        });
        if self.prefetch == u32::from(count) {
            return Ok(());
        }
        self.prefetch = count.into();
        match self.scope {
            Scope::Channel => Ok(self.channel.basic_qos(count, BasicQosOptions { global: true }).await?),
            Scope::Consumer => self.fit().await,
        }
    }

    /// Notes that a delivery of this consumer is settled; [`Consumers::fit`] follows.
    pub(super) fn settled(&mut self, origin: Origin) {
        if let Some(held) = self.held.get_mut(&origin.consumer) {
            *held -= 1;
            self.sources[origin.source].held -= 1;
            if *held == 0 {
                self.held.remove(&origin.consumer);
            }
        }
    }

    /// Whether [`Consumers::fit`] has something to do.
    pub(super) fn misfit(&self) -> bool {
        self.scope == Scope::Consumer
            && (0..self.sources.len()).any(|index| self.change(index) != Change::Keep)
    }

    fn change(&self, index: usize) -> Change {
        let source = &self.sources[index];
        // Without acknowledgements nothing is counted: one consumer does for ever.
        if !source.wanted || (source.queue.no_ack && source.consumer.is_some()) {
            return Change::Keep;
        }
        let own = |active: &Active| self.held.get(&active.number).copied().unwrap_or(0);
        let limit = source.consumer.as_ref().map(|active| active.limit);
        change(self.prefetch, limit, source.held, source.consumer.as_ref().map_or(0, own))
    }

    /// Makes the consumers that count for themselves fit the prefetch count.
    pub(super) async fn fit(&mut self) -> Result<(), Fault> {
        for index in 0..self.sources.len() {
            if self.scope == Scope::Consumer && self.change(index) != Change::Keep {
                self.cancel_one(index).await?;
                // What came until the broker heard of it counts.
                if let Change::Make(limit) = self.change(index) {
                    let count = u16::try_from(limit).unwrap_or(0);
                    self.channel.basic_qos(count, BasicQosOptions { global: false }).await?;
                    self.consume(index, limit).await?;
                }
            }
        }
        Ok(())
    }

    /// Consumes a declared queue, unless it is being consumed.
    pub(super) async fn add(&mut self, queue: Queue) -> Result<(), Fault> {
        if self.sources.iter().any(|source| source.wanted && source.queue.name == queue.name) {
            return Ok(());
        }
        if queue.is_quorum() && self.scope == Scope::Channel {
            self.count_per_consumer().await?;
        }
        self.sources.push(Source { queue, wanted: true, consumer: None, held: 0 });
        match self.scope {
            Scope::Channel => self.consume(self.sources.len() - 1, 0).await,
            Scope::Consumer => self.fit().await,
        }
    }

    async fn consume(&mut self, index: usize, limit: u32) -> Result<(), Fault> {
        self.made += 1;
        let number = self.made;
        let queue = &self.sources[index].queue;
        let options = BasicConsumeOptions { no_ack: queue.no_ack, ..BasicConsumeOptions::default() };
        // The node's name helps operators; a long one is cut to what AMQP allows.
        let node: String = self.node.chars().take(48).collect();
        let (name, tag) = (short(&queue.name)?, short(&format!("{node}-{number}"))?);
        let arguments = table::from_json(&queue.consumer_arguments);
        let consumer = self.channel.basic_consume(name, tag, options, arguments).await?;
        self.sources[index].consumer = Some(Active { number, tag: consumer.tag(), limit });
        let origin = Origin { source: index, consumer: number };
        let items = consumer.map(move |item| match item {
            Ok(delivery) => (origin, Item::Delivery(delivery)),
            Err(error) => (origin, Item::Failed(error.into())),
        });
        self.streams.push(items.chain(stream::once(async move { (origin, Item::Ended) })).boxed());
        Ok(())
    }

    /// A quorum queue does not allow a count for the whole channel: all consumers are made anew with their own.
    async fn count_per_consumer(&mut self) -> Result<(), Fault> {
        for index in 0..self.sources.len() {
            self.cancel_one(index).await?;
        }
        self.channel.basic_qos(0, BasicQosOptions { global: true }).await?;
        self.scope = Scope::Consumer;
        self.fit().await
    }

    /// Stops consuming a queue. What it delivered before is still to be settled.
    pub(super) async fn cancel(&mut self, name: &str) -> Result<(), Fault> {
        for index in 0..self.sources.len() {
            if self.sources[index].queue.name == name {
                self.sources[index].wanted = false;
                self.cancel_one(index).await?;
            }
        }
        Ok(())
    }

    /// Stops consuming all queues.
    pub(super) async fn cancel_all(&mut self) -> Result<(), Fault> {
        for index in 0..self.sources.len() {
            self.sources[index].wanted = false;
            self.cancel_one(index).await?;
        }
        Ok(())
    }

    /// Cancels a consumer and takes what it has delivered until then.
    async fn cancel_one(&mut self, index: usize) -> Result<(), Fault> {
        let Some(active) = self.sources[index].consumer.take() else { return Ok(()) };
        self.channel.basic_cancel(active.tag, BasicCancelOptions::default()).await?;
        while let Some((origin, item)) = self.streams.next().await {
            let ended = origin.consumer == active.number && matches!(item, Item::Ended);
            if let Some(delivery) = self.accept(origin, item)? {
                self.early.push((delivery, origin));
            }
            if ended {
                break;
            }
        }
        Ok(())
    }

    /// The queue of a delivery.
    pub(super) fn queue(&self, origin: Origin) -> &Queue {
        &self.sources[origin.source].queue
    }

    /// Counts a delivery; an end that we did not ask for is a fault.
    fn accept(&mut self, origin: Origin, item: Item) -> Result<Option<Delivery>, Fault> {
        let source = &mut self.sources[origin.source];
        match item {
            Item::Delivery(delivery) => {
                if !source.queue.no_ack {
                    source.held += 1;
                    *self.held.entry(origin.consumer).or_default() += 1;
                }
                Ok(Some(delivery))
            }
            Item::Failed(fault) => Err(fault),
            Item::Ended
                if source.consumer.as_ref().is_some_and(|active| active.number == origin.consumer) =>
            {
                Err(Fault::Cancelled(source.queue.name.clone()))
            }
            Item::Ended => Ok(None),
        }
    }

    /// Waits for deliveries and takes all that are there.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped before it is ready: what was taken is handed out at once.
    pub(super) async fn next(&mut self) -> Heard {
        let mut batch = std::mem::take(&mut self.early);
        while batch.len() < BATCH {
            let next = if batch.is_empty() {
                match self.streams.next().await {
                    // No consumers at all: somebody else must wake us.
                    None => std::future::pending().await,
                    some => some,
                }
            } else {
                match futures_util::poll!(self.streams.next()) {
                    Poll::Ready(item) => item,
                    Poll::Pending => None,
                }
            };
            let Some((origin, item)) = next else { break };
            match self.accept(origin, item) {
                Ok(Some(delivery)) => batch.push((delivery, origin)),
                Ok(None) => {}
                Err(fault) => return Heard::Failed(fault),
            }
        }
        Heard::Deliveries(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_is_made_anew_when_it_has_much_less_room_than_it_could_have() {
        for (prefetch, limit, held, own, expected) in [
            // A plain worker: nothing ever changes.
            (8, None, 0, 0, Change::Make(8)),
            (8, Some(8), 5, 5, Change::Keep),
            (8, Some(8), 8, 8, Change::Keep),
            // Eight tasks with an eta, each raising the prefetch count.
            (9, Some(8), 8, 8, Change::Make(1)),
            (16, Some(8), 8, 8, Change::Make(8)),
            (16, Some(8), 12, 4, Change::Keep),
            // One of them has run.
            (15, Some(8), 8, 0, Change::Keep),
            (15, Some(8), 7, 0, Change::Keep),
            // Three are being run for which there is no room in the count any more.
            (11, Some(8), 6, 0, Change::Make(5)),
            // There is room again, but not much.
            (8, Some(4), 2, 0, Change::Keep),
            (8, Some(2), 1, 0, Change::Make(7)),
            // The count goes down.
            (4, Some(8), 1, 1, Change::Make(3)),
            (4, Some(8), 6, 6, Change::Drop),
            (4, None, 6, 0, Change::Keep),
            (4, None, 3, 0, Change::Make(1)),
            // No bound, and back.
            (0, Some(8), 8, 8, Change::Make(0)),
            (0, Some(0), 800, 800, Change::Keep),
            (4, Some(0), 800, 800, Change::Drop),
        ] {
            assert_eq!(change(prefetch, limit, held, own), expected, "{prefetch} {limit:?} {held} {own}");
        }
    }

    /// The broker fills every consumer up to its limit at any time.
    #[test]
    fn little_more_than_the_prefetch_count_is_ever_held_and_there_is_always_room_for_something() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut prefetch, mut limit, mut own, mut old) = (8_u32, None, 0_u32, 0_u32);
            for _ in 0..200 {
                let settle = random.bool();
                if settle && own > 0 && random.bool() {
                    own -= 1;
                } else if settle && old > 0 {
                    old -= 1;
                } else if !settle {
                    prefetch = random.u32(1..40);
                }
                match change(prefetch, limit, own + old, own) {
                    Change::Keep => {}
                    Change::Make(room) => (limit, old, own) = (Some(room), old + own, 0),
                    Change::Drop => (limit, old, own) = (None, old + own, 0),
                }
                assert_ne!(limit, Some(0), "seed {seed}: no bound");
                let before = own + old;
                own = limit.unwrap_or(0);
                assert!(own + old <= before.max(prefetch + prefetch / 4), "seed {seed}");
                assert!(own + old > 0, "seed {seed}: stalled");
            }
        }
    }
}
