//! Which deliveries are unsettled, and how few frames settle a batch of them. Pure.
//!
//! The broker numbers the deliveries of a channel 1, 2, 3, …; the ledger is a window on that line.
//! Settling a tag twice would make RabbitMQ close the channel, so a tag leaves the ledger when it is settled.

use std::collections::VecDeque;

use super::consumers::Origin;
use crate::broker::Settlement;

/// One frame to the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// `basic.ack`; with `multiple` it covers every unsettled tag up to this one.
    Ack { tag: u64, multiple: bool },
    /// `basic.reject`.
    Reject { tag: u64, requeue: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// Delivered by this consumer.
    Open(Origin),
    /// Part of the batch that is being planned.
    Acking,
    Settled,
}

/// The unsettled deliveries of one channel.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// The tag of the first entry; every tag below it is settled.
    first: u64,
    /// Never starts with a settled entry.
    entries: VecDeque<Entry>,
}

impl Ledger {
    /// Notes a delivery. The broker's tags only grow; those in between were delivered without acknowledgement.
    pub(super) fn delivered(&mut self, tag: u64, origin: Origin) {
        if self.entries.is_empty() {
            self.first = tag;
        }
        let Some(index) = tag.checked_sub(self.first) else { return };
        let Ok(index) = usize::try_from(index) else { return };
        if index < self.entries.len() {
            return;
        }
        self.entries.resize(index, Entry::Settled);
        self.entries.push_back(Entry::Open(origin));
    }

    /// The frames that settle a batch; tags that are not open are left out. Rejections come first, in
    /// their order, so that the acknowledgements after them need not spare them. `settled` is told whose
    /// deliveries they are.
    pub(super) fn settle(
        &mut self,
        batch: impl IntoIterator<Item = (u64, Settlement)>,
        mut settled: impl FnMut(Origin),
    ) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut acks = Vec::new();
        for (tag, settlement) in batch {
            let Some((index, origin)) = self.open(tag) else { continue };
            settled(origin);
            self.entries[index] = match settlement {
                Settlement::Ack => {
                    acks.push(tag);
                    Entry::Acking
                }
                Settlement::Reject => {
                    frames.push(Frame::Reject { tag, requeue: false });
                    Entry::Settled
                }
                Settlement::Requeue | Settlement::GiveBack => {
                    frames.push(Frame::Reject { tag, requeue: true });
                    Entry::Settled
                }
            };
        }
        let covered = self.covered();
        if let Some((last, 2..)) = covered {
            frames.push(Frame::Ack { tag: last, multiple: true });
            acks.retain(|tag| *tag > last);
        }
        for tag in acks {
            frames.push(Frame::Ack { tag, multiple: false });
        }
        for entry in &mut self.entries {
            if *entry == Entry::Acking {
                *entry = Entry::Settled;
            }
        }
        while self.entries.front() == Some(&Entry::Settled) {
            self.entries.pop_front();
            self.first += 1;
        }
        frames
    }

    /// The last tag that one `multiple` acknowledgement may name, and how many of the batch it covers.
    fn covered(&self) -> Option<(u64, usize)> {
        let run = self.entries.iter().take_while(|entry| !matches!(entry, Entry::Open(_)));
        let (last, count) = run
            .enumerate()
            .filter(|(_, entry)| **entry == Entry::Acking)
            .fold((None, 0), |(_, count), (index, _)| (Some(index), count + 1));
        last.map(|index| (self.first + index as u64, count))
    }

    fn open(&self, tag: u64) -> Option<(usize, Origin)> {
        let index = usize::try_from(tag.checked_sub(self.first)?).ok()?;
        match self.entries.get(index) {
            Some(Entry::Open(origin)) => Some((index, *origin)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = Origin { source: 0, consumer: 1 };

    fn ledger(tags: impl IntoIterator<Item = u64>) -> Ledger {
        let mut ledger = Ledger::default();
        tags.into_iter().for_each(|tag| ledger.delivered(tag, ORIGIN));
        ledger
    }

    fn acks(tags: &[u64]) -> Vec<(u64, Settlement)> {
        tags.iter().map(|tag| (*tag, Settlement::Ack)).collect()
    }

    #[test]
    fn a_run_from_the_lowest_unsettled_tag_is_one_frame_and_the_rest_are_single() {
        let mut ledger = ledger(1..=6);
        let frames = ledger.settle(acks(&[2, 1, 3, 5]), |_| {});
        assert_eq!(frames, [Frame::Ack { tag: 3, multiple: true }, Frame::Ack { tag: 5, multiple: false }]);
        assert_eq!(ledger.settle(acks(&[6, 4]), |_| {}), [Frame::Ack { tag: 6, multiple: true }]);
        assert!(ledger.entries.is_empty());
    }

    #[test]
    fn nothing_is_settled_twice_and_unknown_tags_are_left_out() {
        let mut ledger = ledger([1, 2]);
        assert_eq!(ledger.settle(acks(&[1, 1, 9]), |_| {}), [Frame::Ack { tag: 1, multiple: false }]);
        assert_eq!(ledger.settle(acks(&[1]), |_| {}), []);
        assert!(ledger.open(2).is_some() && ledger.open(1).is_none());
    }

    #[test]
    fn a_rejection_goes_before_the_acknowledgement_that_spans_it() {
        let mut ledger = ledger(1..=3);
        let batch = [(1, Settlement::Ack), (2, Settlement::Reject), (3, Settlement::Ack)];
        let frames = ledger.settle(batch, |_| {});
        assert_eq!(frames, [Frame::Reject { tag: 2, requeue: false }, Frame::Ack { tag: 3, multiple: true }]);
    }

    /// The broker's side of the contract: `multiple` covers what is open, a tag that is not open is an error.
    #[test]
    fn whatever_the_order_the_broker_sees_each_tag_settled_exactly_once_as_asked() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut ledger = Ledger::default();
            let mut next = 1;
            let mut asked = std::collections::BTreeMap::new();
            let mut at_broker = std::collections::BTreeMap::new();
            let mut held = Vec::new();
            for _ in 0..30 {
                for _ in 0..random.usize(0..8) {
                    next += random.u64(1..=2);
                    ledger.delivered(next, ORIGIN);
                    held.push(next);
                    at_broker.insert(next, None);
                }
                random.shuffle(&mut held);
                let count = random.usize(0..=held.len());
                let batch: Vec<_> = held
                    .drain(..count)
                    .map(|tag| {
                        let kinds =
                            [Settlement::Ack, Settlement::Ack, Settlement::Reject, Settlement::GiveBack];
                        (tag, *random.choice(&kinds).unwrap())
                    })
                    .collect();
                asked.extend(batch.iter().copied());
                for frame in ledger.settle(batch, |_| {}) {
                    match frame {
                        Frame::Ack { tag, multiple } => {
                            assert_eq!(at_broker[&tag], None, "seed {seed}: {tag} settled twice");
                            for (open, state) in at_broker.range_mut(..=tag) {
                                if state.is_none() && (multiple || *open == tag) {
                                    *state = Some(Settlement::Ack);
                                }
                            }
                        }
                        Frame::Reject { tag, requeue } => {
                            let state = at_broker.get_mut(&tag).unwrap();
                            assert_eq!(*state, None, "seed {seed}: {tag} settled twice");
                            *state = Some(if requeue { Settlement::GiveBack } else { Settlement::Reject });
                        }
                    }
                }
                assert!(held.iter().all(|tag| ledger.open(*tag).is_some()));
            }
            for (tag, state) in at_broker {
                assert_eq!(state, asked.get(&tag).copied(), "seed {seed}: {tag}");
            }
        }
    }
}
