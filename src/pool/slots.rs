//! Which child runs what: the pool's books. No I/O.
//!
//! A place (`index`) holds one child at a time and has one slot (prefork, solo) or several (threads). A child that
//! leaves or dies is replaced at its place, under its slots. One that will soon be worn out gets a spare: a second
//! child of the place that waits, up and idle, until the slots are free for it. Every job that was given out is ended
//! exactly once: by the child's own frame, or with the child's death.

mod lanes;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::ipc::{FromChild, ToChild};
use super::loops::{self, Cancelled};
use super::process::Link;
use super::wear::{FIRST_LEAD, Gauge, Wear, Weight};
use super::zygote::{Number, human_status};
use super::{Event, Gone, Interrupt, Job, JobId, Outcome, SlotId, StoreId, Work};

/// How often children are weighed in the middle of a task.
pub(super) const WEIGH_EVERY: Duration = Duration::from_secs(1);

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
    /// Jobs of an event loop that were cancelled and have not ended.
    cancelled: Cancelled,
    gauge: Gauge,
    scale: Scale,
    /// A spare is to be there when it leaves.
    wants_spare: bool,
    /// The task that it ran last, where children are weighed.
    ran: Option<String>,
    /// Signals that the zygote has not yet confirmed. While there are any no job is given out: a soft limit
    /// must never reach the task after the one it was meant for.
    signals: u32,
    /// Why it leaves, where it was not told to for good.
    gone: Option<Gone>,
    /// The child is being killed: how its jobs end.
    doom: Option<Outcome>,
    kill_at: Option<Instant>,
}

impl Child {
    fn new(number: Number, lanes: u32, now: Instant) -> Self {
        Self {
            number,
            pid: 0,
            link: None,
            phase: Phase::Starting,
            announced: false,
            lanes: (0..lanes).map(|_| None).collect(),
            last: None,
            cancelled: Cancelled::default(),
            gauge: Gauge::new(now),
            scale: Scale::Off,
            wants_spare: false,
            ran: None,
            signals: 0,
            gone: None,
            doom: None,
            kill_at: None,
        }
    }

    fn running(&self) -> u32 {
        self.lanes.iter().map(|lane| u32::from(lane.is_some())).sum()
    }

    /// Whether it can be given jobs again once it is free.
    fn is_fit(&self) -> bool {
        let held = self.signals > 0 || !self.cancelled.is_empty() || self.scale == Scale::Held;
        self.phase == Phase::Up && self.doom.is_none() && !held
    }
}

/// Whether a child is to be weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    Off,
    /// In the middle of a task.
    Timer,
    /// After a task: what that has left free takes no job until it is known.
    Held,
}

/// A job as messages name it.
fn shown(job: &Job) -> String {
    match job.work {
        Work::Message => format!("Task {}[{}]", job.task, job.task_id),
        Work::Call => "a call of the app's own".to_owned(),
    }
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
/// Why a child ends that is worn out.
fn worn(child: &Child) -> Gone {
    if child.gauge.is_heavy() { Gone::Memory } else { Gone::Tasks }
}

/// Marks the slot by which a spare is answered.
const SPARE: SlotId = 1 << 31;

/// The pool's books.
pub(super) struct Slots {
    lanes: u32,
    /// The children run event loops: see `loops.rs`.
    looped: bool,
    wear: Wear,
    /// Those that have the slots of their place.
    children: BTreeMap<u32, Child>,
    /// Those that wait to have them.
    spares: BTreeMap<u32, Child>,
    /// How long a child takes to come up.
    lead: Duration,
    /// The pool stops: no place is filled again, and what is left at this time is killed.
    deadline: Option<Instant>,
    /// Every place, and whether it is to hold a child.
    places: BTreeMap<u32, bool>,
    /// Last in, first out: the child that has just ended a task has the warmest caches.
    idle: Vec<SlotId>,
    /// Slots of a child of many that are not used any more.
    closed: HashSet<SlotId>,
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
            spares: BTreeMap::new(),
            lead: FIRST_LEAD,
            deadline: None,
            places: (0..places).map(|index| (index, true)).collect(),
            idle: Vec::new(),
            closed: HashSet::new(),
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
        self.places.values().filter(|wanted| **wanted).count() * self.lanes as usize - self.closed.len()
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

    /// Whether a child is to be asked for: the place has none that goes on, or one that will soon be worn out and has
    /// no spare.
    pub(super) fn lacks(&self, index: u32) -> bool {
        self.wanted(index)
            && !self.spares.contains_key(&index)
            && self
                .children
                .get(&index)
                .is_none_or(|child| child.wants_spare || child.phase == Phase::Leaving)
    }

    /// Whether the place has a child that takes jobs.
    pub(super) fn is_served(&self, index: u32) -> bool {
        self.children.get(&index).is_some_and(|child| child.phase == Phase::Up)
    }

    /// A child has been asked for.
    pub(super) fn starting(&mut self, index: u32, number: Number, now: Instant) {
        let child = Child::new(number, self.lanes, now);
        let taken = self.children.contains_key(&index);
        let books = if taken { &mut self.spares } else { &mut self.children };
        books.insert(index, child);
    }

    /// It could not be forked.
    pub(super) fn unborn(&mut self, index: u32, number: Number) {
        if self.spares.get(&index).is_some_and(|spare| spare.number == number) {
            self.spares.remove(&index);
        } else if self.children.get(&index).is_some_and(|child| child.number == number) {
            self.children.remove(&index);
            // A spare exists only beside a child that was there before it.
            self.spares.remove(&index).into_iter().for_each(|spare| {
                self.children.insert(index, spare);
            });
        }
    }

    /// It runs, and must be up by then.
    pub(super) fn forked(&mut self, index: u32, number: Number, pid: u32, link: Arc<Link>, up_by: Instant) {
        // One that nobody wants any more was told to leave before it could be.
        let Some(child) = self.child(index, number) else { return link.leave(Leave::Stop) };
        child.pid = pid;
        if child.phase == Phase::Leaving {
            link.leave(Leave::Stop);
        }
        child.link = Some(link);
        child.kill_at = Some(child.kill_at.map_or(up_by, |before| before.min(up_by)));
    }

    fn child(&mut self, index: u32, number: Number) -> Option<&mut Child> {
        let here = [self.children.get_mut(&index), self.spares.get_mut(&index)];
        here.into_iter().flatten().find(|child| child.number == number)
    }

    fn seen(&self, index: u32, number: Number) -> Option<&Child> {
        let here = [self.children.get(&index), self.spares.get(&index)];
        here.into_iter().flatten().find(|child| child.number == number)
    }

    /// Whether the child is in the books: one that leaves and runs nothing is not.
    pub(super) fn knows(&self, index: u32, number: Number) -> bool {
        self.seen(index, number).is_some()
    }

    /// How a child that waits for an answer is named: by its slot, a spare by one that no child has.
    fn asker(&self, index: u32, number: Number) -> Option<SlotId> {
        let first = index * self.lanes;
        if self.spares.get(&index).is_some_and(|spare| spare.number == number) {
            return Some(first | SPARE);
        }
        self.children.get(&index).filter(|child| child.number == number).map(|_| first)
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
        let (wear, lead) = (self.wear, self.lead);
        let child = self.children.get_mut(&(slot / self.lanes));
        let Some((child, link)) = child.and_then(|child| child.link.clone().map(|link| (child, link))) else {
            return Err(job);
        };
        link.run(&job);
        self.jobs.insert(job.id, slot);
        child.last = Some(job.id);
        child.lanes[(slot % self.lanes) as usize] = Some(job);
        let pid = child.pid;
        // What it runs may be its last: nothing else is asked for here, where every job passes.
        if wear.tasks.is_some() && !child.wants_spare {
            child.wants_spare = child.gauge.wears_out(child.running(), lead, &wear, Instant::now());
            if child.wants_spare {
                link.wake();
            }
        }
        // Many run on a loop: its last is known when it is given, not when so many have ended.
        if self.looped && child.gauge.is_spent(child.running(), &wear) {
            child.gone.get_or_insert(Gone::Tasks);
            self.leave(slot / self.lanes, Leave::Recycle);
        }
        Ok((slot, pid))
    }

    /// A slot can take a job, unless its child was given its last with the one before.
    fn free(&mut self, slot: SlotId) {
        let up = self.children.get(&(slot / self.lanes)).is_some_and(|child| child.phase == Phase::Up);
        if !up || self.closed.contains(&slot) {
            return;
        }
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
        match frame {
            FromChild::Up { pid } => {
                let Some(child) = self.child(index, number) else { return };
                if child.phase != Phase::Starting {
                    return;
                }
                child.pid = pid;
                child.kill_at = None;
                child.phase = Phase::Up;
                let took = child.gauge.up(Instant::now());
                self.lead = (self.lead + took) / 2;
                self.open(index, events);
                self.settle(index, events);
            }
            FromChild::Accepted { job } => events.push(Event::Accepted { job }),
            FromChild::Answered { job, value } => events.push(Event::Answered { job, value }),
            FromChild::Store { job, confirm, record } => {
                let confirm =
                    confirm.zip(self.asker(index, number)).map(|(serial, slot)| StoreId { slot, serial });
                events.push(Event::Store { job, record, confirm });
            }
            FromChild::Part { job, serial, part } => {
                let confirm = self.asker(index, number).map(|slot| StoreId { slot, serial });
                events.push(Event::Part { job, part, confirm });
            }
            FromChild::Publish { job, confirm, publication } => {
                let confirm =
                    confirm.zip(self.asker(index, number)).map(|(serial, slot)| StoreId { slot, serial });
                events.push(Event::Publish { job, publication, confirm });
            }
            FromChild::Ended { job, outcome } => {
                if self.child(index, number).is_some() {
                    self.ended(index, job, outcome, events);
                    self.settle(index, events);
                }
            }
        }
    }

    /// The slots of a place whose child is up are there.
    fn open(&mut self, index: u32, events: &mut Vec<Event>) {
        let Some(child) = self.children.get_mut(&index) else { return };
        if child.phase != Phase::Up || std::mem::replace(&mut child.announced, true) {
            return;
        }
        let pid = child.pid;
        self.slots(index).for_each(|slot| self.free(slot));
        events.extend(self.announced(index).map(|slot| Event::Up { slot, pid }));
    }

    /// A child that leaves and runs nothing makes way for the spare, or for the next that will be forked.
    fn settle(&mut self, index: u32, events: &mut Vec<Event>) {
        let slots = self.announced(index);
        if let Some(child) = self.children.get_mut(&index)
            && child.phase == Phase::Leaving
        {
            if std::mem::take(&mut child.announced) {
                events.extend(slots.map(|slot| Event::Down { slot }));
                events.extend(child.gone.map(Event::Gone));
            }
            if child.running() == 0 && self.wanted(index) {
                self.children.remove(&index);
            }
        }
        if !self.children.contains_key(&index)
            && let Some(spare) = self.spares.remove(&index)
        {
            self.children.insert(index, spare);
            self.open(index, events);
        }
    }

    fn ended(&mut self, index: u32, job: JobId, outcome: Outcome, events: &mut Vec<Event>) {
        let Some(slot) = self.jobs.remove(&job) else { return };
        // A child that reports itself lost is on its way out.
        let lost = matches!(outcome, Outcome::WorkerLost { .. });
        let (wear, lanes, lead) = (self.wear, self.lanes, self.lead);
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
        let ran = child.lanes[(slot % lanes) as usize].take();
        child.gauge.ended();
        if child.phase != Phase::Up {
            return;
        }
        if lost || child.doom.is_some() || child.gauge.is_worn(&wear) {
            child.gone = Some(match doomed(child) {
                Some(gone) => gone,
                None if lost => Gone::Lost,
                None => worn(child),
            });
            self.leave(index, Leave::Recycle);
            return;
        }
        if wear.memory.is_some() {
            child.ran = ran.map(|job| shown(&job));
            child.scale = Scale::Held;
        }
        if wear.tasks.is_some() {
            child.wants_spare |= child.gauge.wears_out(child.running(), lead, &wear, Instant::now());
        }
        if held {
            self.free_all(index);
        } else if child.is_fit() {
            self.free(slot);
        }
    }

    /// Children that run something are to be weighed.
    pub(super) fn weigh_all(&mut self) {
        for child in self.children.values_mut() {
            if child.phase == Phase::Up && child.scale == Scale::Off && child.running() > 0 {
                child.scale = Scale::Timer;
                if let Some(link) = &child.link {
                    link.wake();
                }
            }
        }
    }

    /// The limit, where the child is to be weighed now, and whether no job is given to it until it is.
    pub(super) fn to_weigh(&self, index: u32, number: Number) -> Option<(u64, bool)> {
        let most = self.wear.memory?;
        let child = self.seen(index, number).filter(|child| child.phase == Phase::Up)?;
        (child.scale != Scale::Off).then_some((most, child.scale == Scale::Held))
    }

    /// What the child weighs; none: it cannot be told, which stops nobody.
    pub(super) fn weighed(
        &mut self,
        index: u32,
        number: Number,
        weight: Option<Weight>,
        events: &mut Vec<Event>,
    ) {
        let (wear, lead, looped) = (self.wear, self.lead, self.looped);
        let Some(child) = self.children.get_mut(&index).filter(|child| child.number == number) else {
            return;
        };
        let after_task = std::mem::replace(&mut child.scale, Scale::Off) == Scale::Held;
        if let (Some(weight), Some(most)) = (weight, wear.memory)
            && child.gauge.weighed(weight, after_task, &wear)
        {
            tell_heavy(child, weight.kib(), most);
        }
        child.wants_spare |= child.gauge.wears_out(child.running(), lead, &wear, Instant::now());
        // A loop ends what it runs and is given nothing more: it may never be without a job.
        let may_leave = looped || child.running() == 0;
        if child.phase == Phase::Up && child.gauge.is_worn(&wear) && may_leave {
            child.gone = Some(worn(child));
            self.leave(index, Leave::Recycle);
            self.settle(index, events);
        } else {
            self.release(index, events);
        }
    }

    /// Slots that were held back can take jobs: the worker is told, which was waiting for them.
    fn release(&mut self, index: u32, events: &mut Vec<Event>) {
        let freed = self.free_all(index);
        let told = freed.into_iter().take(if self.looped { 1 } else { usize::MAX });
        events.extend(told.map(|slot| Event::Idle { slot }));
    }

    /// Slots of a fit child that run nothing can take jobs; says which could not before.
    fn free_all(&mut self, index: u32) -> Vec<SlotId> {
        let first = index * self.lanes;
        let Some(child) = self.children.get(&index).filter(|child| child.is_fit()) else { return Vec::new() };
        let mut free: Vec<SlotId> =
            (first..).zip(&child.lanes).filter(|(_, job)| job.is_none()).map(|(slot, _)| slot).collect();
        free.retain(|slot| !self.idle.contains(slot));
        free.iter().for_each(|slot| self.free(*slot));
        free
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
        if self.child(index, number).is_some() {
            self.settle(index, events);
        }
    }

    /// When everything is killed that has not left.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// When the child is to be killed.
    pub(super) fn kill_at(&self, index: u32, number: Number) -> Option<Instant> {
        self.seen(index, number)?.kill_at
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
    pub(super) fn signalled(&mut self, index: u32, number: Number, events: &mut Vec<Event>) {
        let Some(child) = self.child(index, number) else { return };
        child.signals = child.signals.saturating_sub(1);
        self.release(index, events);
    }

    /// What the child runs, as messages name it.
    pub(super) fn running(&self, index: u32, number: Number) -> Vec<String> {
        let lanes = self.seen(index, number).map(|child| child.lanes.iter().flatten());
        lanes.into_iter().flatten().map(|job| shown(job)).collect()
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
        if self.spares.get(&index).is_some_and(|spare| spare.number == number) {
            let stillborn = self.spares.remove(&index).is_some_and(|spare| spare.phase == Phase::Starting);
            if stillborn && self.deadline.is_none() {
                events.push(Event::Gone(Gone::Stillborn));
            }
            return stillborn;
        }
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
        self.settle(index, events);
        child.phase == Phase::Starting
    }

    /// Whether the death of this child was our doing.
    pub(super) fn doomed(&self, index: u32, number: Number) -> bool {
        self.seen(index, number).is_some_and(|child| child.doom.is_some())
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
        link.send(&ToChild::Cancel { job, soft });
        link.wake();
        true
    }

    /// The child that waits for a store.
    pub(super) fn waiting(&mut self, store: StoreId) -> Option<Arc<Link>> {
        let index = (store.slot & !SPARE) / self.lanes;
        // A spare that asked may have its slot by now.
        let spare = if store.slot & SPARE == 0 { None } else { self.spares.get_mut(&index) };
        let child = spare.or(self.children.get_mut(&index))?;
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
        let busy = |index: &u32| self.children.get(index).is_some_and(|child| child.running() > 0);
        places.sort_by_key(|index| (busy(index), std::cmp::Reverse(*index)));
        for index in places.into_iter().take(by) {
            self.places.insert(index, false);
            self.leave(index, Leave::Stop);
            self.dismiss(index);
        }
    }

    /// Every child makes way for another after what it runs; none that is there or on its way takes over from it.
    pub(super) fn restart(&mut self) {
        for spare in std::mem::take(&mut self.spares).into_values() {
            if let Some(link) = &spare.link {
                link.leave(Leave::Stop);
            }
        }
        let indexes: Vec<u32> = self.children.keys().copied().collect();
        for index in indexes {
            self.leave(index, Leave::Recycle);
        }
    }

    /// A spare that is not wanted any more.
    fn dismiss(&mut self, index: u32) {
        if let Some(spare) = self.spares.get_mut(&index) {
            spare.phase = Phase::Leaving;
            if let Some(link) = &spare.link {
                link.leave(Leave::Stop);
            }
        }
    }

    /// The place's owner has ended: the index may be used again.
    pub(super) fn forget(&mut self, index: u32) {
        self.places.remove(&index);
    }

    /// Every child is to leave, and is killed at the deadline.
    pub(super) fn stop(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
        let indexes: Vec<u32> = self.places.keys().copied().collect();
        for index in indexes {
            self.leave(index, Leave::Stop);
            self.dismiss(index);
        }
        for child in self.children.values_mut().chain(self.spares.values_mut()) {
            child.kill_at = Some(child.kill_at.map_or(deadline, |before| before.min(deadline)));
            if let Some(link) = &child.link {
                link.wake();
            }
        }
    }
}

fn tell_heavy(child: &Child, used: u64, most: u64) {
    let running = child.lanes.iter().flatten().next().map(|job| shown(job));
    let (task, when) = match (running, child.running(), &child.ran) {
        (Some(task), 1, _) => (task, "it is replaced when the task has ended"),
        (Some(task), count, _) => {
            (format!("{task} and {} others", count - 1), "it is replaced when they have ended")
        }
        (None, _, Some(task)) => (task.clone(), "it is replaced"),
        (None, _, None) => ("no task".to_owned(), "it is replaced"),
    };
    let (pid, bytes) = (child.pid, used.saturating_mul(1024));
    tracing::warn!(
        target: "celery.pool",
        "child process exiting after exceeding memory limit ({used}KiB / {most}KiB): pid:{pid} has {bytes} bytes for \
         itself with {task}; {when}."
    );
}
