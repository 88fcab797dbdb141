//! When a child is worn out, and when it will be: most tasks and most memory. Pure arithmetic.

use std::time::Duration;

use tokio::time::Instant;

/// When a child is replaced.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wear {
    /// After so many tasks.
    pub(super) tasks: Option<u32>,
    /// After the task in which it is found to have more than so many KiB for itself.
    pub(super) memory: Option<u64>,
}

/// What a child weighs, KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// All that is resident: never less than its own.
    AtMost(u64),
    /// What it has for itself alone.
    Private(u64),
}

impl Weight {
    /// The number.
    pub(super) fn kib(self) -> u64 {
        match self {
            Self::AtMost(kib) | Self::Private(kib) => kib,
        }
    }
}

/// How long a child takes to come up, until the first has shown it.
pub(super) const FIRST_LEAD: Duration = Duration::from_millis(100);
/// A spare is asked for so many times earlier than the last one needed: on a busy machine it takes longer.
const MARGIN: f64 = 2.0;
/// Tasks that must still fit below the memory limit, or a spare is asked for: the next may grow by more than the last.
const TASKS_LEFT: f64 = 2.0;

/// How far one child is worn.
#[derive(Debug)]
pub(super) struct Gauge {
    /// When it was asked for; since it is up, when it came up.
    since: Instant,
    ended: u32,
    weight: Option<Weight>,
    /// How much a task adds, KiB: the mean of those past, the later the more.
    growth: f64,
    heavy: bool,
}

impl Gauge {
    /// Of a child that is asked for.
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, ended: 0, weight: None, growth: 0.0, heavy: false }
    }

    /// It is up: says how long that took.
    pub(super) fn up(&mut self, now: Instant) -> Duration {
        let took = now.saturating_duration_since(self.since);
        self.since = now;
        took
    }

    /// It has ended a task.
    pub(super) fn ended(&mut self) {
        self.ended += 1;
    }

    /// It was weighed. `true`: it is above the limit, and was not known to be.
    pub(super) fn weighed(&mut self, weight: Weight, after_task: bool, wear: &Wear) -> bool {
        if after_task {
            let added = match (self.weight, weight) {
                (Some(Weight::AtMost(before)), Weight::AtMost(now))
                | (Some(Weight::Private(before)), Weight::Private(now)) => now.saturating_sub(before) as f64,
                // Two measures cannot be subtracted.
                _ => self.growth,
            };
            self.growth = (self.growth + added) / 2.0;
            self.weight = Some(weight);
        }
        let heavy = wear.memory.is_some_and(|most| weight.kib() > most);
        heavy && !std::mem::replace(&mut self.heavy, true)
    }

    /// Whether it was found above the limit.
    pub(super) fn is_heavy(&self) -> bool {
        self.heavy
    }

    /// Whether it must take no more tasks.
    pub(super) fn is_worn(&self, wear: &Wear) -> bool {
        self.heavy || wear.tasks.is_some_and(|most| self.ended >= most)
    }

    /// Whether it has run, or runs, all the tasks that it may.
    pub(super) fn is_spent(&self, running: u32, wear: &Wear) -> bool {
        wear.tasks.is_some_and(|most| self.ended + running >= most)
    }

    /// Whether it will be worn out with the tasks that it runs, or by the time that another could be up.
    pub(super) fn wears_out(&self, running: u32, lead: Duration, wear: &Wear, now: Instant) -> bool {
        if self.heavy || self.is_spent(running, wear) {
            return true;
        }
        let begun = self.ended + running;
        if self.ended == 0 {
            return false;
        }
        let pace = now.saturating_duration_since(self.since).as_secs_f64() / f64::from(self.ended);
        let ahead = lead.as_secs_f64() * MARGIN / pace.max(1e-6);
        if wear.tasks.is_some_and(|most| f64::from(most - begun) <= ahead) {
            return true;
        }
        let room = match (wear.memory, self.weight) {
            (Some(most), Some(weight)) => most.saturating_sub(weight.kib()) as f64,
            _ => return false,
        };
        self.growth * ahead.max(TASKS_LEFT) >= room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks(most: u32) -> Wear {
        Wear { tasks: Some(most), memory: None }
    }

    /// A child that has ended so many tasks in so many seconds.
    fn after(ended: u32, seconds: f64) -> (Gauge, Instant) {
        let start = Instant::now();
        let mut gauge = Gauge::new(start);
        gauge.up(start);
        (0..ended).for_each(|_| gauge.ended());
        (gauge, start + Duration::from_secs_f64(seconds))
    }

    #[test]
    fn slow_tasks_ask_for_a_spare_with_the_last_and_quick_ones_before() {
        let lead = Duration::from_millis(50);
        for (ended, seconds, running, spare) in [
            (8, 80.0, 1, false),
            (9, 90.0, 0, false),
            (9, 90.0, 1, true),
            // A millisecond each: a hundred pass while another child comes up.
            (5, 0.005, 1, true),
        ] {
            let (gauge, now) = after(ended, seconds);
            assert_eq!(
                gauge.wears_out(running, lead, &tasks(10), now),
                spare,
                "{ended} in {seconds} s, {running} running"
            );
        }
        let (gauge, now) = after(0, 0.0);
        assert!(gauge.wears_out(1, lead, &tasks(1), now), "its only task is its last");
        assert!(!gauge.wears_out(0, lead, &tasks(1), now), "it waits for it");
    }

    #[test]
    fn a_child_that_grows_asks_for_a_spare_while_two_more_tasks_fit() {
        let wear = Wear { tasks: None, memory: Some(50_000) };
        let (mut gauge, _) = after(0, 0.0);
        let mut asked = Vec::new();
        for (number, weight) in (10_000..=50_000).step_by(5_000).enumerate() {
            gauge.ended();
            assert!(!gauge.weighed(Weight::Private(weight), true, &wear));
            let now = Instant::now() + Duration::from_secs(60 * (number as u64 + 1));
            if gauge.wears_out(0, FIRST_LEAD, &wear, now) {
                asked.push(weight);
            }
        }
        assert_eq!(asked, [45_000, 50_000]);
        assert!(!gauge.is_worn(&wear));
        assert!(gauge.weighed(Weight::Private(55_000), false, &wear));
        assert!(!gauge.weighed(Weight::Private(56_000), true, &wear), "said once");
        assert!(gauge.is_worn(&wear));
    }

    #[test]
    fn a_child_that_is_large_and_does_not_grow_needs_no_spare() {
        let wear = Wear { tasks: None, memory: Some(50_000) };
        let (mut gauge, now) = after(0, 60.0);
        for _ in 0..20 {
            gauge.ended();
            gauge.weighed(Weight::AtMost(49_000), true, &wear);
        }
        assert!(!gauge.wears_out(0, FIRST_LEAD, &wear, now));
    }
}
