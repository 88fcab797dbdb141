//! Requests that wait for a slot: those for event loops apart, so that neither kind waits behind the other.

use std::collections::VecDeque;

use super::request::Request;

/// Where a request runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// In a slot of its own.
    Slot,
    /// On an event loop, as one of many.
    Loop,
}

impl Lane {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::Slot, Self::Loop];

    fn of(request: &Request) -> Self {
        if request.policy.asynchronous { Self::Loop } else { Self::Slot }
    }
}

/// Two queues that remember the order across both: what is given back goes back in the order in which it came.
#[derive(Debug, Default)]
pub(super) struct Ready {
    slots: VecDeque<(i64, Request)>,
    loops: VecDeque<(i64, Request)>,
    first: i64,
    next: i64,
}

impl Ready {
    fn queue(&mut self, lane: Lane) -> &mut VecDeque<(i64, Request)> {
        match lane {
            Lane::Slot => &mut self.slots,
            Lane::Loop => &mut self.loops,
        }
    }

    /// Behind all others.
    pub(super) fn push_back(&mut self, request: Request) {
        let place = self.next;
        self.next += 1;
        self.queue(Lane::of(&request)).push_back((place, request));
    }

    /// Before all others.
    pub(super) fn push_front(&mut self, request: Request) {
        self.first -= 1;
        let place = self.first;
        self.queue(Lane::of(&request)).push_front((place, request));
    }

    /// The next of a lane.
    pub(super) fn pop(&mut self, lane: Lane) -> Option<Request> {
        self.queue(lane).pop_front().map(|(_, request)| request)
    }

    /// How many wait in a lane.
    pub(super) fn len(&self, lane: Lane) -> usize {
        match lane {
            Lane::Slot => self.slots.len(),
            Lane::Loop => self.loops.len(),
        }
    }

    /// All, in no certain order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().chain(&self.loops).map(|(_, request)| request)
    }

    /// Takes all out, in their order.
    pub(super) fn drain(&mut self) -> Vec<Request> {
        let mut all: Vec<_> = self.slots.drain(..).chain(self.loops.drain(..)).collect();
        all.sort_by_key(|(place, _)| *place);
        all.into_iter().map(|(_, request)| request).collect()
    }
}

/// The window grows and shrinks by so many, so that the broker is not told of every message.
pub(super) const STEP: u32 = 64;

/// How many more deliveries may be unsettled for the sake of event loops that hold `held` unsettled ones and run
/// `running`: those do not take the place of others, and `depth` more may be fetched, as it may take so many that wait for
/// a slot to come to the next for a loop. `most`: what loops may hold. Never shrinks by a single step, so that it does not
/// swing.
pub(super) fn window(before: u32, held: usize, running: usize, most: u32, depth: u32) -> u32 {
    if held + running == 0 {
        return 0;
    }
    let held = u32::try_from(held).unwrap_or(u32::MAX).min(most);
    let wanted = held.div_ceil(STEP).saturating_mul(STEP).saturating_add(depth);
    if before > wanted && before - wanted <= STEP { before } else { wanted }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::broker::{Delivery, Handle};
    use crate::config::TaskPolicy;
    use crate::protocol::{DeliveryInfo, Json, Message};

    fn request(name: &str, asynchronous: bool) -> Request {
        let message = Message {
            content_type: None,
            content_encoding: None,
            headers: Json::empty(),
            properties: Json::empty(),
            body: Bytes::new(),
        };
        let delivery = Delivery { message, info: DeliveryInfo::default(), handle: Handle::new(1) };
        let mut request = Request::untranslated(delivery);
        request.headers.id = name.to_owned();
        request.policy = Arc::new(TaskPolicy { asynchronous, ..TaskPolicy::default() });
        request
    }

    #[test]
    fn lanes_do_not_wait_for_each_other_and_what_is_left_keeps_its_order() {
        let mut ready = Ready::default();
        for (name, asynchronous) in [("a", false), ("b", true), ("c", false), ("d", true)] {
            ready.push_back(request(name, asynchronous));
        }
        ready.push_front(request("first", true));
        assert_eq!((ready.len(Lane::Slot), ready.len(Lane::Loop)), (2, 3));
        let next = ready.pop(Lane::Loop).unwrap();
        assert_eq!(next.headers.id, "first");
        next.handle.abandon();
        assert_eq!(ready.iter().count(), 4);
        let name = |request: Request| {
            request.handle.abandon();
            request.headers.id
        };
        let left: Vec<String> = ready.drain().into_iter().map(name).collect();
        assert_eq!(left, ["a", "b", "c", "d"]);
    }

    #[test]
    fn what_loops_hold_is_not_counted_and_a_few_more_may_be_fetched() {
        let window = |before, held, running, most| super::window(before, held, running, most, 10);
        assert_eq!(window(0, 0, 0, 2000), 0);
        assert_eq!(window(0, 0, 9, 2000), 10);
        assert_eq!(window(0, 1, 1, 2000), 74);
        assert_eq!(window(74, 64, 64, 2000), 74);
        assert_eq!(window(74, 65, 64, 2000), 138);
        assert_eq!(window(138, 64, 64, 2000), 138, "does not swing");
        assert_eq!(window(138, 0, 0, 2000), 0);
        assert_eq!(window(0, 5000, 0, 100), 138, "never above what loops may hold");
    }
}
