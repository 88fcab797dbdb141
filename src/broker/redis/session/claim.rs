//! Taking messages, and waiting for them without asking.

use std::collections::HashMap;
use std::time::Duration;

use redis::Value;

use super::Live;
use super::queues::Source;
use crate::broker::envelope::{self, Malformed};
use crate::broker::redis::link::TURN;
use crate::broker::redis::options::Order;
use crate::broker::redis::restore;
use crate::broker::{Delivery, Event, Handle, Tag};
use crate::error::BrokerError;
use crate::protocol::{DeliveryInfo, Message};

/// Most messages taken in one go. More would only lengthen the script, which keeps everybody else waiting.
pub(super) const CLAIM: usize = 64;
/// Most fields settled by one script: Lua cannot unpack many thousands.
const SETTLE: usize = 1000;
/// Without `CLIENT TRACKING`: the shortest and the longest wait between two looks.
pub(super) const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Claims that find nothing although a list is there, before its type is asked for.
const FUTILE: u32 = 3;

impl Live {
    /// How many more deliveries the worker may hold.
    pub(super) fn room(&self) -> usize {
        if self.paused || self.sources.is_empty() {
            return 0;
        }
        match self.prefetch {
            0 => self.batch.size(),
            count => (count as usize).saturating_sub(self.held.len()).min(self.batch.size()),
        }
    }

    /// How many messages the next turn asks for.
    pub(super) fn wanted(&self) -> usize {
        if self.ready && self.outbox.is_empty() { self.room() } else { 0 }
    }

    /// One turn: deletes what is settled and takes what there is room for.
    pub(super) async fn claim(&mut self) -> Result<(), BrokerError> {
        while !self.settled.is_empty() || self.wanted() > 0 {
            // The fields stay in `settled` until the server has answered.
            let settled = self.settled.len().min(SETTLE);
            let wanted = if settled == self.settled.len() { self.wanted() } else { 0 };
            let tags = self.shared.tags(wanted as u64);
            let mut call = self.shared.call();
            if wanted > 0 {
                for step in 0..self.sources.first().map_or(0, |source| source.lists.len()) {
                    self.sources.iter().for_each(|source| call.key(source.lists[step].clone()));
                }
            }
            let fair = self.shared.options.order == Order::RoundRobin;
            let sources = if wanted > 0 { self.sources.len() } else { 0 };
            call.arg(&self.owner).arg(tags).arg(wanted).arg(i64::from(fair)).arg(sources).arg(settled);
            for source in self.sources.iter().take(sources) {
                call.arg(&source.json);
            }
            for field in &self.settled[..settled] {
                call.arg(field);
            }
            let answer: Option<Vec<Value>> = self.link.eval(&TURN, &call).await?;
            self.settled.drain(..settled);
            let taken = answer.ok_or_else(|| self.declared_dead())?;
            if wanted > 0 {
                let count = self.on_taken(tags, taken);
                if count < wanted {
                    self.watch(count).await?;
                }
                return Ok(());
            }
        }
        Ok(())
    }

    pub(super) fn on_taken(&mut self, first: Tag, taken: Vec<Value>) -> usize {
        let mut deliveries = Vec::with_capacity(taken.len() / 2);
        let mut rotation = Vec::with_capacity(taken.len() / 2);
        let bytes =
            taken.iter().map(|value| if let Value::BulkString(item) = value { item.len() } else { 0 }).sum();
        self.batch.saw(taken.len() / 2, bytes);
        let mut values = taken.into_iter();
        let mut tag = first;
        while let (Some(Value::Int(number)), Some(Value::BulkString(item))) = (values.next(), values.next()) {
            let index = usize::try_from(number - 1).unwrap_or(0).min(self.sources.len() - 1);
            let read = envelope::read(&item, &self.sources[index].name);
            self.deliver(tag, read, &item, &mut deliveries);
            rotation.push(index);
            tag += 1;
        }
        if !deliveries.is_empty() {
            self.emit(Event::Deliveries(deliveries));
        }
        self.rotate(&rotation);
        rotation.len()
    }

    pub(super) fn deliver(
        &mut self,
        tag: Tag,
        read: Result<(Message, DeliveryInfo), Malformed>,
        item: &[u8],
        deliveries: &mut Vec<Delivery>,
    ) {
        match read {
            Ok((message, info)) => {
                self.held.insert(tag);
                deliveries.push(Delivery { message, info, handle: Handle::new(tag) });
            }
            Err(error) => {
                tracing::error!(target: "celeriac.redis", %error, preview = restore::preview(item),
                    "Dropped an item of a queue that is no message.");
                self.settled.push(self.shared.field(self.session, tag));
            }
        }
    }

    /// In turns: who delivered goes to the end, the last one last.
    pub(super) fn rotate(&mut self, delivered: &[usize]) {
        if self.shared.options.order != Order::RoundRobin || self.sources.len() < 2 {
            return;
        }
        let last: HashMap<usize, usize> =
            delivered.iter().enumerate().map(|(position, index)| (*index, position + 1)).collect();
        let mut sources: Vec<(usize, Source)> = self
            .sources
            .drain(..)
            .enumerate()
            .map(|(index, source)| (last.get(&index).copied().unwrap_or(0), source))
            .collect();
        sources.sort_by_key(|(position, _)| *position);
        self.sources = sources.into_iter().map(|(_, source)| source).collect();
    }

    /// All queues seemed empty: looks again in a way that makes the server tell us when one is not.
    pub(super) async fn watch(&mut self, count: usize) -> Result<(), BrokerError> {
        if count > 0 {
            self.poll = POLL.0;
            self.futile = 0;
        }
        if !self.tracking {
            self.ready = false;
            return Ok(());
        }
        let lists = self.sources.iter().flat_map(|source| &source.lists);
        self.ready = self.link.watch(lists.filter(|list| !self.skipped.contains(*list))).await? > 0;
        if self.ready && count == 0 {
            self.futile += 1;
            if self.futile >= FUTILE {
                self.futile = 0;
                self.skip_what_is_no_list().await?;
            }
        }
        Ok(())
    }

    pub(super) async fn skip_what_is_no_list(&mut self) -> Result<(), BrokerError> {
        let lists: Vec<String> = self.sources.iter().flat_map(|source| source.lists.clone()).collect();
        let mut pipeline = redis::pipe();
        for list in &lists {
            pipeline.cmd("TYPE").arg(list);
        }
        let types: Vec<String> = self.link.pipe(&pipeline).await?;
        for (list, kind) in lists.into_iter().zip(types) {
            if kind != "list" && kind != "none" && !self.skipped.contains(&list) {
                tracing::error!(target: "celeriac.redis", key = list, kind,
                    "The key of a queue is no list; nothing can be taken from it until it is deleted.");
                self.skipped.insert(list);
            }
        }
        Ok(())
    }
}
