//! Which child runs what: the pool's books. No I/O and no clock but what callers pass in.
//!
//! A place (`index`) holds one child at a time and has one slot (prefork, solo) or several (threads). A child that
//! leaves or dies is replaced at its place, under its slots. Every job that was given out is ended exactly once:
//! by the child's own frame, or with the child's death.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use tokio::time::Instant;

use super::ipc::{FromChild, ToChild};
use super::loops::{self, Cancelled};
use super::process::Link;
use super::zygote::{Number, human_status};
use super::{Event, Gone, Interrupt, Job, JobId, Outcome, SlotId, StoreId};

/// When a child is replaced after a task.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wear {
    /// After so many tasks.
    pub(super) tasks: Option<u32>,
    /// When it is left above so many KiB.
    pub(super) memory: Option<u64>,
}

/// Where a child is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Up,
    /// Told to leave: takes no more jobs.
    Leaving,
}

/// One child as the pool sees it.
struct Child {
    number: Number,
    pid: u32,
    link: Option<Arc<Link>>,
    phase: Phase,
    /// Its slots were announced and are to be taken back once.
    announced: bool,
    /// What each of its slots runs.
    lanes: Vec<Option<Box<Job>>>,
    /// The job that it was given last, while nothing else was written to it.
    last: Option<JobId>,
    ended: u32,
    /// Jobs that it was given; counted for event loops, which have many at a time.
    given: u32,
    /// Jobs of an event loop that were cancelled and have not ended.
    cancelled: Cancelled,
    /// Signals that the zygote has not yet confirmed. While there are any no job is given out: a soft limit
    /// must never reach the task after the one it was meant for.
    signals: u32,
    /// Why it leaves, where it was not told to for good.
    gone: Option<Gone>,
    /// The child is being killed: how its jobs end.
    doom: Option<Outcome>,
    kill_at: Option<Instant>,
}

/// What the owner of a child has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// Serve it.
    Serve,
    /// It leaves: see it off, and start its replacement.
    Replace,
}

/// How a child is told to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// For good: the pool stops or shrinks.
    Stop,
    /// It is worn out and will be replaced.
    Recycle,
}

/// Why a child ends that is being killed.
fn doomed(child: &Child) -> Option<Gone> {
    child.doom.as_ref().map(|doom| match doom {
        Outcome::TimedOut { .. } => Gone::TimeLimit,
        _ => Gone::Terminated,
    })
}

/// The pool's books.
pub(super) struct Slots {
    lanes: u32,
    /// The children run event loops: see `loops.rs`.
    looped: bool,
    wear: Wear,
    children: BTreeMap<u32, Child>,
    /// The pool stops: no place is filled again, and what is left at this time is killed.
    deadline: Option<Instant>,
    /// Every place, and whether it is to hold a child.
    places: BTreeMap<u32, bool>,
    /// Last in, first out: the child that has just ended a task has the warmest caches.
    idle: Vec<SlotId>,
    jobs: HashMap<JobId, SlotId>,
    /// Given to a child that died before it read them: they go to the next slot that is free.
    unread: VecDeque<Box<Job>>,
}

impl Slots {
    pub(super) fn new(places: u32, lanes: u32, wear: Wear) -> Self {
        Self {
            lanes,
            looped: false,
            wear,
            children: BTreeMap::new(),
            deadline: None,
            places: (0..places).map(|index| (index, true)).collect(),
            idle: Vec::new(),
            jobs: HashMap::new(),
            unread: VecDeque::new(),
        }
    }

    /// Books of children that run event loops.
    pub(super) fn of_loops(places: u32, lanes: u32, wear: Wear) -> Self {
        let places = loops::places(places).map(|index| (index, true)).collect();
        Self { looped: true, places, ..Self::new(0, lanes.max(1), wear) }
    }

    pub(super) fn capacity(&self) -> usize {
        self.places.values().filter(|wanted| **wanted).count() * self.lanes as usize
    }

    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    pub(super) fn pids(&self) -> Vec<u32> {
        self.children.values().map(|child| child.pid).filter(|pid| *pid != 0).collect()
    }

    /// Whether the place is to hold a child.
    pub(super) fn wanted(&self, index: u32) -> bool {
        self.deadline.is_none() && self.places.get(&index).copied().unwrap_or(false)
    }

    /// A child has been asked for.
    pub(super) fn starting(&mut self, index: u32, number: Number) {
        self.children.insert(
            index,
            Child {
                number,
                pid: 0,
                link: None,
                phase: Phase::Starting,
                announced: false,
                lanes: (0..self.lanes).map(|_| None).collect(),
                last: None,
                ended: 0,
                given: 0,
                cancelled: Cancelled::default(),
                signals: 0,
                gone: None,
                doom: None,
                kill_at: None,
            },
        );
    }

    /// It runs, and must be up by then.
    pub(super) fn forked(&mut self, index: u32, number: Number, pid: u32, link: Arc<Link>, up_by: Instant) {
        if let Some(child) = self.child(index, number) {
            child.pid = pid;
            if child.phase == Phase::Leaving {
                link.leave(Leave::Stop);
            }
            child.link = Some(link);
            child.kill_at = Some(child.kill_at.map_or(up_by, |before| before.min(up_by)));
        }
    }

    fn child(&mut self, index: u32, number: Number) -> Option<&mut Child> {
        self.children.get_mut(&index).filter(|child| child.number == number)
    }

    /// Gives a job to an idle slot; gives it back when none is.
    pub(super) fn submit(&mut self, job: Box<Job>) -> Result<(SlotId, u32), Box<Job>> {
        let slot = if self.looped { loops::least(&mut self.idle, self.lanes) } else { self.idle.pop() };
        match slot {
            Some(slot) => self.assign(slot, job),
            None => Err(job),
        }
    }

    fn assign(&mut self, slot: SlotId, job: Box<Job>) -> Result<(SlotId, u32), Box<Job>> {
        let child = self.children.get_mut(&(slot / self.lanes));
        let Some((child, link)) = child.and_then(|child| child.link.clone().map(|link| (child, link))) else {
            return Err(job);
        };
        link.run(&job);
        self.jobs.insert(job.id, slot);
        child.last = Some(job.id);
        child.lanes[(slot % self.lanes) as usize] = Some(job);
        child.given += 1;
        let (pid, given) = (child.pid, child.given);
        // Many run at a time: the last is known when it is given, not when so many have ended.
        if self.looped && self.wear.tasks.is_some_and(|most| given >= most) {
            self.leave(slot / self.lanes, Leave::Recycle);
        }
        Ok((slot, pid))
    }

    /// A slot can take a job.
    fn free(&mut self, slot: SlotId) {
        if let Some(job) = self.unread.pop_front() {
            match self.assign(slot, job) {
                Ok(_) => return,
                Err(job) => self.unread.push_front(job),
            }
        }
        self.idle.push(slot);
    }

    /// The pool is over: what no child ever read is lost.
    pub(super) fn abandoned(&mut self) -> Vec<Event> {
        let status = "before it was read";
        let lost = |job: Box<Job>| Event::Ended {
            job: job.id,
            outcome: Outcome::WorkerLost { status: status.to_owned() },
        };
        self.unread.drain(..).map(lost).collect()
    }

    /// What a frame of a child means for the pool. A child that was seen off already can only store.
    pub(super) fn frame(&mut self, index: u32, number: Number, frame: FromChild, events: &mut Vec<Event>) {
        let first = index * self.lanes;
        match frame {
            FromChild::Up { pid } => {
                let Some(child) = self.child(index, number) else { return };
                if child.phase != Phase::Starting {
                    return;
                }
                child.pid = pid;
                child.kill_at = None;
                child.phase = Phase::Up;
                child.announced = true;
                for slot in first..first + self.lanes {
                    self.free(slot);
                }
                events.extend(self.announced(index).map(|slot| Event::Up { slot, pid }));
            }
            FromChild::Accepted { job } => events.push(Event::Accepted { job }),
            FromChild::Answered { job, value } => events.push(Event::Answered { job, value }),
            FromChild::Store { job, confirm, record } => {
                let confirm = confirm
                    .filter(|_| self.child(index, number).is_some())
                    .map(|serial| StoreId { slot: first, serial });
                events.push(Event::Store { job, record, confirm });
            }
            FromChild::Part { job, serial, part } => {
                let confirm = self.child(index, number).map(|_| StoreId { slot: first, serial });
                events.push(Event::Part { job, part, confirm });
            }
            FromChild::Publish { job, confirm, publication } => {
                let confirm = confirm
                    .filter(|_| self.child(index, number).is_some())
                    .map(|serial| StoreId { slot: first, serial });
                events.push(Event::Publish { job, publication, confirm });
            }
            FromChild::Ended { job, outcome, memory } => {
                if self.child(index, number).is_some() {
                    self.ended(index, job, outcome, memory, events);
                    self.news(index, number, events);
                }
            }
        }
    }

    fn ended(
        &mut self,
        index: u32,
        job: JobId,
        outcome: Outcome,
        memory: Option<u64>,
        events: &mut Vec<Event>,
    ) {
        let Some(slot) = self.jobs.remove(&job) else { return };
        // A child that reports itself lost is on its way out.
        let lost = matches!(outcome, Outcome::WorkerLost { .. });
        let (wear, lanes, looped) = (self.wear, self.lanes, self.looped);
        let Some(child) = self.children.get_mut(&index) else { return };
        let held = !child.cancelled.is_empty();
        let outcome = child.cancelled.ended(job, outcome);
        events.push(Event::Ended { job, outcome });
        if held {
            child.kill_at = [child.cancelled.kill_at(), self.deadline].into_iter().flatten().min();
            if let Some(link) = &child.link {
                link.wake();
            }
        }
        child.lanes[(slot % lanes) as usize] = None;
        child.ended += 1;
        let heavy = match (memory, wear.memory) {
            (Some(used), Some(most)) if used > most => {
                tracing::warn!(
                    target: "celery.pool",
                    "child process exiting after exceeding memory limit ({used}KiB / {most}KiB)"
                );
                true
            }
            _ => false,
        };
        let worn = heavy || (!looped && wear.tasks.is_some_and(|most| child.ended >= most));
        if child.phase != Phase::Up {
            return;
        }
        if lost || worn || child.doom.is_some() {
            child.gone = Some(match doomed(child) {
                Some(gone) => gone,
                None if lost => Gone::Lost,
                None if heavy => Gone::Memory,
                None => Gone::Tasks,
            });
            self.leave(index, Leave::Recycle);
        } else if held {
            self.release(index);
        } else if child.signals == 0 {
            self.free(slot);
        }
    }

    /// Tells a child to leave: its slots are gone until its replacement is up.
    fn leave(&mut self, index: u32, how: Leave) {
        let slots = self.slots(index);
        self.idle.retain(|slot| !slots.contains(slot));
        let Some(child) = self.children.get_mut(&index) else { return };
        if child.phase == Phase::Leaving {
            return;
        }
        child.phase = Phase::Leaving;
        child.last = None;
        if let Some(link) = &child.link {
            link.leave(how);
        }
    }

    fn slots(&self, index: u32) -> Range<SlotId> {
        index * self.lanes..(index + 1) * self.lanes
    }

    /// The slots of a child that are told of: one for all of an event loop.
    fn announced(&self, index: u32) -> Range<SlotId> {
        let slots = self.slots(index);
        if self.looped { slots.start..slots.start + 1 } else { slots }
    }

    /// Tells of slots that were taken away since the last call.
    pub(super) fn news(&mut self, index: u32, number: Number, events: &mut Vec<Event>) {
        let slots = self.announced(index);
        let Some(child) = self.child(index, number) else { return };
        if child.phase == Phase::Leaving && std::mem::take(&mut child.announced) {
            events.extend(slots.map(|slot| Event::Down { slot }));
            events.extend(child.gone.map(Event::Gone));
        }
    }

    /// What to do about a child after its frames were read.
    pub(super) fn duty(&self, index: u32, number: Number) -> Duty {
        match self.children.get(&index) {
            Some(child)
                if child.number == number
                    && child.phase == Phase::Leaving
                    && self.wanted(index)
                    && child.lanes.iter().all(Option::is_none) =>
            {
                Duty::Replace
            }
            _ => Duty::Serve,
        }
    }

    /// When everything is killed that has not left.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// When the child is to be killed.
    pub(super) fn kill_at(&self, index: u32, number: Number) -> Option<Instant> {
        self.children.get(&index).filter(|child| child.number == number)?.kill_at
    }

    /// The child was killed because its time was up: it need not be killed again.
    /// `true` when it had not come up in time.
    pub(super) fn killed(&mut self, index: u32, number: Number) -> bool {
        let Some(child) = self.child(index, number) else { return false };
        child.kill_at = None;
        child.cancelled.log(child.pid, child.lanes.iter().flatten().count());
        child.phase == Phase::Starting
    }

    /// The zygote has sent a signal.
    pub(super) fn signalled(&mut self, index: u32, number: Number) {
        let Some(child) = self.child(index, number) else { return };
        child.signals = child.signals.saturating_sub(1);
        self.release(index);
    }

    /// The free slots of a child may take jobs again, unless something still holds them back.
    fn release(&mut self, index: u32) {
        let first = index * self.lanes;
        let Some(child) = self.children.get(&index) else { return };
        let held = child.signals > 0 || !child.cancelled.is_empty();
        if held || child.phase != Phase::Up || child.doom.is_some() {
            return;
        }
        let free: Vec<SlotId> =
            (first..).zip(&child.lanes).filter(|(_, job)| job.is_none()).map(|(slot, _)| slot).collect();
        for slot in free {
            if !self.idle.contains(&slot) {
                self.free(slot);
            }
        }
    }

    /// The child is dead and all it wrote was read. `unread`: it had not read what was written to it last.
    /// Returns whether the death says that children cannot live here: it died before it was up.
    pub(super) fn dead(
        &mut self,
        index: u32,
        number: Number,
        code: i32,
        unread: bool,
        events: &mut Vec<Event>,
    ) -> bool {
        if self.child(index, number).is_none() {
            return false;
        }
        let Some(mut child) = self.children.remove(&index) else { return false };
        let slots = self.slots(index);
        self.idle.retain(|slot| !slots.contains(slot));
        let gone = match child.phase {
            Phase::Starting if self.deadline.is_none() => Some(Gone::Stillborn),
            Phase::Up if self.deadline.is_none() => doomed(&child).or(Some(Gone::Lost)),
            // Told of when it began to leave.
            Phase::Leaving if !child.announced => None,
            Phase::Starting | Phase::Up | Phase::Leaving => child.gone.or(doomed(&child)),
        };
        let status = human_status(code);
        for job in child.lanes.into_iter().flatten() {
            self.jobs.remove(&job.id);
            let doom = child.cancelled.remove(job.id).or_else(|| child.doom.clone());
            // Never seen by the child: not its victim.
            if unread && child.last == Some(job.id) && doom.is_none() && self.deadline.is_none() {
                self.unread.push_back(job);
                continue;
            }
            let outcome = doom.unwrap_or_else(|| Outcome::WorkerLost { status: status.clone() });
            events.push(Event::Ended { job: job.id, outcome });
        }
        if !self.unread.is_empty()
            && let Some(slot) = self.idle.pop()
        {
            self.free(slot);
        }
        if child.announced {
            events.extend(self.announced(index).map(|slot| Event::Down { slot }));
        }
        events.extend(gone.map(Event::Gone));
        child.phase == Phase::Starting
    }

    /// Whether the death of this child was our doing.
    pub(super) fn doomed(&self, index: u32, number: Number) -> bool {
        self.children.get(&index).is_some_and(|child| child.number == number && child.doom.is_some())
    }

    /// Whose child a job must be interrupted in, if it still runs. Where the child is to die, `kill_at` bounds it.
    pub(super) fn interrupt(&mut self, job: JobId, how: Interrupt, kill_at: Instant) -> Option<Number> {
        let slot = *self.jobs.get(&job)?;
        let child = self.children.get_mut(&(slot / self.lanes))?;
        child.signals += 1;
        let doom = match how {
            Interrupt::SoftLimit => return Some(child.number),
            Interrupt::HardLimit(limit) => Outcome::TimedOut { limit },
            Interrupt::Terminate(_) => Outcome::Terminated,
        };
        child.doom.get_or_insert(doom);
        child.kill_at = Some(child.kill_at.map_or(kill_at, |before| before.min(kill_at)));
        if let Some(link) = &child.link {
            link.wake();
        }
        Some(child.number)
    }

    /// Has the event loop that runs a job cancel it, and kills its child at `kill_at` if the job has not ended. `false`:
    /// no loop of these books runs it.
    pub(super) fn cancel(&mut self, job: JobId, how: Interrupt, kill_at: Instant) -> bool {
        if !self.looped {
            return false;
        }
        let Some(index) = self.jobs.get(&job).map(|slot| slot / self.lanes) else { return false };
        let slots = self.slots(index);
        let Some(child) = self.children.get_mut(&index) else { return false };
        let Some(link) = child.link.clone() else { return false };
        child.last = None;
        let soft = how == Interrupt::SoftLimit;
        if child.cancelled.add(job, how, kill_at) {
            // What it would be given now might die with it.
            self.idle.retain(|slot| !slots.contains(slot));
            child.kill_at = child.cancelled.kill_at().into_iter().chain(child.kill_at).min();
        }
        link.send(&ToChild::Interrupt { job, soft });
        link.wake();
        true
    }

    /// The child that waits for a store.
    pub(super) fn waiting(&mut self, store: StoreId) -> Option<Arc<Link>> {
        let child = self.children.get_mut(&(store.slot / self.lanes))?;
        child.last = None;
        child.link.clone()
    }

    /// Adds places; says which.
    pub(super) fn grow(&mut self, by: usize) -> Vec<u32> {
        let free: Vec<u32> = (0..)
            .filter(|index| !self.places.contains_key(index) && !self.children.contains_key(index))
            .take(by)
            .collect();
        self.places.extend(free.iter().map(|index| (*index, true)));
        free
    }

    /// Takes places away, those with idle children first.
    pub(super) fn shrink(&mut self, by: usize) {
        let mut places: Vec<u32> =
            self.places.iter().filter(|(_, wanted)| **wanted).map(|(index, _)| *index).collect();
        let busy = |index: &u32| {
            self.children.get(index).is_some_and(|child| child.lanes.iter().any(Option::is_some))
        };
        places.sort_by_key(|index| (busy(index), std::cmp::Reverse(*index)));
        for index in places.into_iter().take(by) {
            self.places.insert(index, false);
            self.leave(index, Leave::Stop);
        }
    }

    /// The place's owner has ended: the index may be used again.
    pub(super) fn forget(&mut self, index: u32) {
        self.places.remove(&index);
    }

    /// Every child is to leave, and is killed at the deadline.
    pub(super) fn stop(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
        let indexes: Vec<u32> = self.children.keys().copied().collect();
        for index in indexes {
            self.leave(index, Leave::Stop);
            if let Some(child) = self.children.get_mut(&index) {
                child.kill_at = Some(child.kill_at.map_or(deadline, |before| before.min(deadline)));
                if let Some(link) = &child.link {
                    link.wake();
                }
            }
        }
    }
}
