//! Queues that are only listened to: on a channel of their own, without acknowledgements, past every prefetch.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::{BoxStream, SelectAll, once};
use lapin::Channel;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions};
use lapin::types::{FieldTable, ShortString};

use super::connect::Link;
use super::fault::{Fault, short};

/// A message of a queue; none: its consumer has ended.
pub(super) type Overheard = (Arc<str>, Option<lapin::Result<lapin::message::Delivery>>);

/// The queues, by name.
#[derive(Default)]
pub(super) struct Sides {
    channel: Option<Channel>,
    consumers: HashMap<Arc<str>, ShortString>,
    streams: SelectAll<BoxStream<'static, Overheard>>,
}

impl Sides {
    /// Consumes a queue that was declared.
    pub(super) async fn hark(&mut self, link: &Link, queue: &str) -> Result<(), Fault> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => link.channel().await?,
        };
        let channel = self.channel.insert(channel);
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let tag = short("")?;
        let consumer = channel.basic_consume(short(queue)?, tag, options, FieldTable::default()).await?;
        let name: Arc<str> = Arc::from(queue);
        self.consumers.insert(name.clone(), consumer.tag());
        let last = name.clone();
        let heard = consumer.map(move |heard| (name.clone(), Some(heard)));
        self.streams.push(heard.chain(once(async move { (last, None) })).boxed());
        Ok(())
    }

    /// Ends the consumer of a queue, and the queue with it where it is deleted with its last consumer.
    pub(super) async fn deafen(&mut self, queue: &str) -> Result<(), Fault> {
        if let (Some(tag), Some(channel)) = (self.consumers.remove(queue), &self.channel) {
            channel.basic_cancel(tag, BasicCancelOptions::default()).await?;
        }
        Ok(())
    }

    /// Whether a queue is to be heard.
    pub(super) fn listens_to(&self, queue: &str) -> bool {
        self.consumers.contains_key(queue)
    }

    /// Whether the channel is as it should be.
    pub(super) fn is_open(&self) -> bool {
        self.channel.as_ref().is_none_or(|channel| channel.status().connected())
    }

    /// The next message; never ready where nothing is listened to.
    ///
    /// # Cancel safety
    /// May be dropped at any await.
    pub(super) async fn next(&mut self) -> Overheard {
        match self.streams.next().await {
            Some(heard) => heard,
            None => std::future::pending().await,
        }
    }
}
