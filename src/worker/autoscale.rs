//! `--autoscale`: how many processes the pool is to have. [`Autoscaler`] only reckons; the loop does it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::consumer::Consumer;
use super::ready::Lane;
use super::shutdown::Phase;
use crate::config::AutoscaleConfig;

/// Logger of the lines.
const LOGGER: &str = "celery.worker.autoscale";

/// A change of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    /// So many more.
    Up(usize),
    /// So many less.
    Down(usize),
}

/// As many processes as there are tasks, between two bounds. As in Celery it grows at once, and shrinks when neither a
/// process was added nor a task received (5.7) for some time.
#[derive(Debug)]
pub(super) struct Autoscaler {
    max: usize,
    min: usize,
    keepalive: Duration,
    grown: Option<Instant>,
    received: Option<Instant>,
    check_at: Instant,
}

impl Autoscaler {
    pub(super) fn new(config: &AutoscaleConfig, now: Instant) -> Self {
        let keepalive = Duration::try_from_secs_f64(config.keepalive).unwrap_or(Duration::from_secs(30));
        Self {
            max: config.max as usize,
            min: config.min as usize,
            keepalive,
            grown: None,
            received: None,
            check_at: now + keepalive,
        }
    }

    /// A task was received: the next look is now.
    pub(super) fn received(&mut self, now: Instant) {
        self.received = Some(now);
        self.check_at = now;
    }

    /// When to look again.
    pub(super) fn check_at(&self) -> Instant {
        self.check_at
    }

    /// Most processes.
    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// What is to change, with so many tasks reserved and so many processes.
    fn decide(&mut self, tasks: usize, processes: usize, now: Instant) -> Option<Scale> {
        self.check_at = now + self.keepalive;
        let wanted = tasks.min(self.max);
        if wanted > processes {
            self.grown = Some(now);
            return Some(Scale::Up(wanted - processes));
        }
        let wanted = tasks.max(self.min);
        // Nothing was ever done: as in Celery nothing is undone.
        let active = self.grown.max(self.received)?;
        if wanted >= processes {
            return None;
        }
        if now < active + self.keepalive {
            self.check_at = active + self.keepalive;
            return None;
        }
        Some(Scale::Down(processes - wanted))
    }

    fn shown(&self, processes: usize, tasks: usize) -> Value {
        json!({"max": self.max, "min": self.min, "current": processes, "qty": tasks})
    }
}

impl Consumer {
    /// Tasks that the worker has taken up and not done yet, but for those of event loops, which need no process.
    fn reserved(&self) -> usize {
        let running = self.jobs.active().filter(|(_, job)| !job.request.policy.asynchronous).count();
        running + self.ready.len(Lane::Slot) + self.desk.running() + self.desk.claims()
    }

    /// Grows or shrinks the pool when it is time to look.
    pub(super) fn autoscale(&mut self) {
        let now = Instant::now();
        if self.shutdown.phase > Phase::Running
            || self.autoscaler.as_ref().is_none_or(|autoscaler| autoscaler.check_at > now)
        {
            return;
        }
        let (tasks, processes) = (self.reserved(), self.pool.capacity());
        match self.autoscaler.as_mut().and_then(|autoscaler| autoscaler.decide(tasks, processes, now)) {
            Some(Scale::Up(by)) => self.scale_up(by),
            Some(Scale::Down(by)) => self.scale_down(by),
            None => {}
        }
    }

    fn scale_up(&mut self, by: usize) {
        tracing::info!(target: LOGGER, "Scaling up {by} processes.");
        self.pool.grow(by);
    }

    fn scale_down(&mut self, by: usize) {
        tracing::info!(target: LOGGER, "Scaling down {by} processes.");
        self.pool.shrink(by);
    }

    /// The `autoscale` command; what the bounds then are: most, fewest.
    pub(super) fn change_autoscale(&mut self, max: Option<u32>, min: Option<u32>) -> Option<(usize, usize)> {
        let before = self.autoscaler.as_ref()?.max;
        if let Some(max) = max.map(|max| max as usize) {
            let processes = self.pool.capacity();
            if max < processes {
                self.scale_down(processes - max);
            }
            self.autoscaler.as_mut()?.max = max;
            let slots = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
            self.change_prefetch(slots(max) - slots(before));
        }
        if let Some(min) = min.map(|min| min as usize) {
            let processes = self.pool.capacity();
            if min > processes {
                self.scale_up(min - processes);
            }
            self.autoscaler.as_mut()?.min = min;
        }
        let autoscaler = self.autoscaler.as_ref()?;
        Some((autoscaler.max, autoscaler.min))
    }

    /// What `inspect stats` shows.
    pub(super) fn autoscaler_shown(&self) -> Option<Value> {
        Some(self.autoscaler.as_ref()?.shown(self.pool.capacity(), self.reserved()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaler(max: u32, min: u32) -> (Autoscaler, Instant) {
        let now = Instant::now();
        (Autoscaler::new(&AutoscaleConfig { max, min, keepalive: 30.0 }, now), now)
    }

    fn later(now: Instant, seconds: u64) -> Instant {
        now + Duration::from_secs(seconds)
    }

    #[test]
    fn it_grows_at_once_to_the_number_of_tasks_and_not_above_the_bound() {
        let (mut scaler, now) = scaler(4, 1);
        assert_eq!(scaler.decide(1, 1, now), None);
        assert_eq!(scaler.decide(3, 1, now), Some(Scale::Up(2)));
        assert_eq!(scaler.decide(9, 3, now), Some(Scale::Up(1)));
        assert_eq!(scaler.decide(9, 4, now), None);
    }

    #[test]
    fn it_shrinks_when_nothing_was_added_or_received_for_the_keepalive() {
        let (mut scaler, now) = scaler(4, 1);
        scaler.received(now);
        assert_eq!(scaler.decide(3, 1, now), Some(Scale::Up(2)));
        assert_eq!(scaler.decide(0, 3, later(now, 29)), None);
        assert_eq!(scaler.check_at(), later(now, 30));
        scaler.received(later(now, 29));
        assert_eq!(scaler.decide(0, 3, later(now, 31)), None);
        assert_eq!(scaler.decide(2, 3, later(now, 59)), Some(Scale::Down(1)));
        assert_eq!(scaler.decide(0, 2, later(now, 60)), Some(Scale::Down(1)));
        assert_eq!(scaler.decide(0, 1, later(now, 90)), None);
    }

    #[test]
    fn what_was_there_from_the_start_stays_until_there_was_something_to_do() {
        let (mut scaler, now) = scaler(4, 0);
        assert_eq!(scaler.decide(0, 4, later(now, 600)), None);
    }
}
