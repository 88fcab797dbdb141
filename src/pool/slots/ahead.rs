//! Jobs that lie ready beside the one that a child runs, and their way back.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::{Child, Slots};
use crate::pool::slate::Slate;
use crate::pool::tray::{DEPTH, Tray};
use crate::pool::{Event, Job, JobId, SlotId, TakeBack};

/// What a child that runs one job at a time shares with the supervisor beside its socket.
pub(in crate::pool) struct Beside {
    pub(super) slate: Slate,
    tray: Tray,
    /// What was laid on the tray behind the job that the child runs, as far as we know.
    pub(super) ahead: VecDeque<Box<Job>>,
    /// What the child runs did not fit on the tray and came over the socket.
    streamed: bool,
}

impl Beside {
    /// Empty, with the child's ends.
    pub(in crate::pool) fn new() -> Result<(Self, [OwnedFd; 2]), Errno> {
        let (slate, their_slate) = Slate::new()?;
        let (tray, their_tray) = Tray::new()?;
        let beside = Self { slate, tray, ahead: VecDeque::new(), streamed: false };
        Ok((beside, [their_slate, their_tray]))
    }

    /// Gives an idle child a job, where it may lie there and fits.
    pub(super) fn give(&mut self, job: &Job, lies: bool) -> bool {
        self.tray.begins();
        self.streamed = !(lies && self.tray.put(job));
        !self.streamed
    }

    /// The child has ended a job and goes on by itself.
    pub(super) fn next(&mut self) -> Option<Box<Job>> {
        self.tray.begins();
        self.streamed = false;
        self.ahead.pop_front()
    }

    pub(super) fn take_back(&mut self) -> Vec<JobId> {
        let back = self.tray.take_back();
        self.ahead.retain(|job| !back.contains(&job.id));
        back
    }
}

impl Child {
    /// Whether a job may be laid behind the one that it runs.
    fn may_lead(&self) -> bool {
        self.is_fit()
            && self.running() == 1
            && self.beside.as_ref().is_some_and(|beside| {
                beside.ahead.len() < DEPTH && !beside.streamed && !beside.tray.is_long()
            })
    }

    /// Whether it has moved on from this job, whose end has not been heard yet.
    pub(super) fn is_past(&self, job: JobId) -> bool {
        let last = self.beside.as_ref().and_then(|beside| beside.ahead.back());
        last.is_some_and(|last| last.id != job)
    }
}

impl Slots {
    /// Whether a job may be laid behind another.
    pub(in crate::pool) fn may_lead(&self) -> bool {
        // A child that is soon worn out must not have more than it may run.
        let lasts = self.wear.tasks.is_none() && self.wear.memory.is_none();
        lasts && self.children.values().any(Child::may_lead)
    }

    /// Lays a job behind a short one; gives it back when there is none.
    pub(in crate::pool) fn submit_ahead(&mut self, job: Box<Job>) -> Result<(SlotId, u32), Box<Job>> {
        let fewest = self
            .children
            .iter_mut()
            .filter(|(_, child)| child.may_lead())
            .min_by_key(|(_, child)| child.beside.as_ref().map_or(0, |beside| beside.ahead.len()));
        let Some((index, Child { beside: Some(beside), pid, .. })) = fewest else { return Err(job) };
        if !beside.tray.put(&job) {
            return Err(job);
        }
        let slot = index * self.lanes;
        self.jobs.insert(job.id, slot);
        beside.ahead.push_back(job);
        Ok((slot, *pid))
    }

    /// Takes back what no child has begun, oldest first.
    pub(in crate::pool) fn take_back(&mut self, which: TakeBack) -> Vec<JobId> {
        let wanted = |child: &Child| {
            child.beside.as_ref().is_some_and(|beside| match which {
                TakeBack::Everything => true,
                TakeBack::Ahead => !beside.ahead.is_empty(),
                TakeBack::BehindLong => !beside.ahead.is_empty() && beside.tray.is_long(),
            })
        };
        let indexes: Vec<u32> =
            self.children.iter().filter(|(_, child)| wanted(child)).map(|(index, _)| *index).collect();
        let mut back: Vec<JobId> = indexes.into_iter().flat_map(|index| self.take_back_of(index)).collect();
        back.sort_unstable();
        back
    }

    /// The same from one child.
    pub(super) fn take_back_of(&mut self, index: u32) -> Vec<JobId> {
        let Some(child) = self.children.get_mut(&index) else { return Vec::new() };
        let Some(beside) = &mut child.beside else { return Vec::new() };
        let back = beside.take_back();
        for job in &back {
            self.jobs.remove(job);
        }
        // It may not even have begun the first.
        let emptied =
            child.lanes.first_mut().is_some_and(|lane| lane.take_if(|job| back.contains(&job.id)).is_some());
        if emptied && child.is_fit() {
            self.free(index * self.lanes);
        }
        back
    }

    /// Takes back what lies ready for a child that is to take nothing more; the worker is told with the next events.
    pub(super) fn clear_tray(&mut self, index: u32) {
        let back = self.take_back_of(index);
        self.returned.extend(back.into_iter().map(|job| Event::Returned { job }));
    }
}
