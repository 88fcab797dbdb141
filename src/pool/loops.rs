//! What is different where a child runs an event loop, on which a job is one of many.
//!
//! Jobs are spread over the loops, as those on one share its processor. One is interrupted by a frame, never by a
//! signal, so that its neighbours go on; only when it does not end in time does its child die, and they with it.
//! While one is being cancelled its child is given nothing new.

use std::collections::HashMap;
use std::ops::Range;

use tokio::time::Instant;

use super::{Interrupt, JobId, Outcome, SlotId};

/// The first place of an event loop: far behind every other, so that no slot of theirs has the number of another.
pub(super) const FIRST_PLACE: u32 = 1 << 16;

/// The places of so many loops.
pub(super) fn places(count: u32) -> Range<u32> {
    FIRST_PLACE..FIRST_PLACE + count
}

/// Takes the idle slot whose loop runs about the fewest jobs: lower lanes are taken first on every loop.
pub(super) fn least(idle: &mut Vec<SlotId>, lanes: u32) -> Option<SlotId> {
    let (at, _) = idle.iter().enumerate().min_by_key(|(_, slot)| (*slot % lanes, **slot))?;
    Some(idle.swap_remove(at))
}

/// The jobs of one child that are being cancelled: how each ends when it ends, and when its child is killed if not.
#[derive(Default)]
pub(super) struct Cancelled(HashMap<JobId, (Outcome, Instant)>);

impl Cancelled {
    /// Notes a job; the first reason stays. `false` for what is no more than a soft limit.
    pub(super) fn add(&mut self, job: JobId, how: Interrupt, kill_at: Instant) -> bool {
        let outcome = match how {
            Interrupt::SoftLimit => return false,
            Interrupt::HardLimit(limit) => Outcome::TimedOut { limit },
            Interrupt::Terminate(_) => Outcome::Terminated,
        };
        self.0.entry(job).or_insert((outcome, kill_at));
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When the child is killed.
    pub(super) fn kill_at(&self) -> Option<Instant> {
        self.0.values().map(|(_, at)| *at).min()
    }

    /// How a job ends that was cancelled.
    pub(super) fn remove(&mut self, job: JobId) -> Option<Outcome> {
        self.0.remove(&job).map(|(outcome, _)| outcome)
    }

    /// A job has ended. What it was cancelled for counts only if the child says that it was: it may just have ended
    /// by itself.
    pub(super) fn ended(&mut self, job: JobId, outcome: Outcome) -> Outcome {
        match (self.remove(job), outcome) {
            (Some(why), Outcome::Terminated) => why,
            (_, outcome) => outcome,
        }
    }

    /// Says why a child is killed with all that it runs.
    pub(super) fn log(&self, pid: u32, running: usize) {
        if !self.is_empty() {
            tracing::error!(
                target: "celery.pool",
                "{} of {running} tasks on the event loop of process {pid} did not end when they were cancelled: the \
                 process is killed with all of them.",
                self.0.len()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn jobs_are_spread_over_the_loops() {
        let (first, lanes) = (FIRST_PLACE * 4, 4);
        let mut idle: Vec<SlotId> = (first..first + 8).collect();
        let mut loops = [0, 0];
        while let Some(slot) = least(&mut idle, lanes) {
            loops[(slot / lanes - FIRST_PLACE) as usize] += 1;
            assert!(loops[0] - loops[1] <= 1, "{loops:?}");
        }
        assert_eq!(loops, [4, 4]);
    }

    #[test]
    fn a_child_is_killed_for_the_job_that_was_cancelled_first_of_those_left() {
        let now = Instant::now();
        let (early, late) = (now + Duration::from_secs(5), now + Duration::from_secs(9));
        let mut cancelled = Cancelled::default();
        assert!(!cancelled.add(1, Interrupt::SoftLimit, early));
        assert!(cancelled.add(1, Interrupt::HardLimit(2.0), early));
        assert!(cancelled.add(2, Interrupt::Terminate(15), late));
        assert_eq!(cancelled.kill_at(), Some(early));
        assert_eq!(cancelled.ended(1, Outcome::Terminated), Outcome::TimedOut { limit: 2.0 });
        assert_eq!(cancelled.kill_at(), Some(late));
        assert_eq!(cancelled.ended(2, Outcome::Ignored), Outcome::Ignored);
        assert!(cancelled.is_empty());
    }
}
