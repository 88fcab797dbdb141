//! What is due when: requests waiting for their `eta` here, deliveries parked in the broker, time limits of jobs.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

/// A heap of things by the time they are due. Things due at the same time come in the order they were put in.
#[derive(Debug)]
pub struct Due<T> {
    heap: BinaryHeap<Reverse<Entry<T>>>,
    serial: u64,
}

#[derive(Debug)]
struct Entry<T> {
    at: f64,
    serial: u64,
    what: T,
}

impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.serial.cmp(&other.serial))
    }
}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<T> Eq for Entry<T> {}

impl<T> Default for Due<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), serial: 0 }
    }
}

impl<T> Due<T> {
    /// Puts a thing in, due at `at`.
    pub fn push(&mut self, at: f64, what: T) {
        self.serial += 1;
        self.heap.push(Reverse(Entry { at, serial: self.serial, what }));
    }

    /// Drops what is of no use any more where that has become most of it: `alive` things at least are of use.
    pub fn prune(&mut self, alive: usize, of_use: impl Fn(&T) -> bool) {
        if self.heap.len() > 1024 && self.heap.len() > 4 * alive {
            self.heap.retain(|Reverse(entry)| of_use(&entry.what));
        }
    }

    /// When the first is due.
    pub fn next(&self) -> Option<f64> {
        self.heap.peek().map(|Reverse(entry)| entry.at)
    }

    /// Takes the first out if it is due by `now`.
    pub fn pop(&mut self, now: f64) -> Option<T> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry.what)
    }

    /// Takes everything out, in no order.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        self.heap.drain().map(|Reverse(entry)| entry.what)
    }

    /// Takes everything out, in the order in which it would have come, each with its time.
    pub fn drain_sorted(&mut self) -> Vec<(f64, T)> {
        let mut entries: Vec<_> = self.heap.drain().map(|Reverse(entry)| entry).collect();
        entries.sort();
        entries.into_iter().map(|entry| (entry.at, entry.what)).collect()
    }

    /// Everything with its time, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (f64, &T)> + '_ {
        self.heap.iter().map(|Reverse(entry)| (entry.at, &entry.what))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }
}

/// One token bucket a task name: `rate` tasks a second, room for one.
#[derive(Debug, Default)]
pub struct RateLimits {
    free_at: HashMap<String, f64>,
}

impl RateLimits {
    /// When the next task of this name may start; takes that turn. With a rate of 0 no task ever may.
    pub fn turn(&mut self, task: &str, rate: f64, now: f64) -> f64 {
        let free_at = self.free_at.get(task).copied().unwrap_or(now).max(now);
        let next = if rate > 0.0 { free_at + 1.0 / rate } else { f64::INFINITY };
        self.free_at.insert(task.to_owned(), next);
        if rate > 0.0 { free_at } else { f64::INFINITY }
    }

    /// Forgets the turns taken, after the rate was changed.
    pub fn reset(&mut self, task: &str) {
        self.free_at.remove(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_come_out_by_time_and_then_in_order() {
        let mut due = Due::default();
        let mut times: Vec<f64> = (0..200).map(|_| f64::from(fastrand::u8(0..10))).collect();
        for (index, at) in times.iter().enumerate() {
            due.push(*at, (*at, index));
        }
        assert_eq!(due.pop(-1.0), None);
        let mut out = Vec::new();
        while let Some(thing) = due.pop(10.0) {
            out.push(thing);
        }
        times.sort_by(f64::total_cmp);
        assert_eq!(out.iter().map(|(at, _)| *at).collect::<Vec<_>>(), times);
        assert!(out.windows(2).all(|pair| pair[0].0 < pair[1].0 || pair[0].1 < pair[1].1));
    }

    #[test]
    fn a_rate_limit_spaces_tasks_and_lets_the_first_run_at_once() {
        let mut limits = RateLimits::default();
        let turns: Vec<f64> = (0..4).map(|_| limits.turn("add", 2.0, 100.0)).collect();
        assert_eq!(turns, [100.0, 100.5, 101.0, 101.5]);
        assert_eq!(limits.turn("add", 2.0, 200.0), 200.0);
        assert_eq!(limits.turn("other", 0.0, 200.0), f64::INFINITY);
    }
}
