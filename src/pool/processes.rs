//! The pool of Python children: [`start`] and the [`Pool`] that the worker holds.
//!
//! One task (the keeper) owns the zygote and a task for every place (`process.rs`); the books (`slots.rs`) are
//! shared with the [`Pool`], whose methods only write frames and note wishes, so that they never wait.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ipc::ToChild;
use super::loops;
use super::memory::Killings;
use super::process::{Failure, Link, keep};
use super::slots::{Slots, WEIGH_EVERY};
use super::wear::Wear;
use super::zygote::{self, Command, Number, Scope, Zygote, ZygoteHandle};
use super::{
    EVENT_CAPACITY, Event, Interrupt, Job, JobId, Pool, PoolConfig, Reload, Running, SlotId, StoreId,
};
use crate::backend::Counted;
use crate::error::Error;

/// Between TERM and KILL at the hard limit, as in Celery.
const HARD_GRACE: Duration = Duration::from_millis(100);
/// Between the signal of a terminated task and KILL: its `finally` blocks run.
const TERMINATE_GRACE: Duration = Duration::from_secs(5);
/// A child that starts anew imports the app before it is up, which may be as slow as the start of a worker.
const IMPORTING: Duration = Duration::from_secs(300);
/// A place that has failed so often in a row, half a minute with the waits between, will go on failing.
const FAILURES: u32 = 12;

/// What the tasks of a pool share.
pub(super) struct Shared {
    slots: Mutex<Slots>,
    /// Not bounded: it holds a few commands a child, and its writers must not wait.
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) stopping: CancellationToken,
    pub(super) up_within: Duration,
    numbers: Arc<AtomicU32>,
    lived: AtomicBool,
    trouble: Arc<Mutex<Option<String>>>,
    troubled: CancellationToken,
    killings: Arc<Mutex<Killings>>,
    kind: Kind,
    /// Where the places of event loops begin when they are shown: behind those of the other children.
    beside: u32,
}

impl Shared {
    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a child's process is called in the log.
    pub(super) fn process_name(&self, number: Number) -> String {
        match self.kind {
            Kind::Prefork | Kind::Loops => format!("ForkPoolWorker-{number}"),
            Kind::Threads | Kind::Solo | Kind::Gevent | Kind::Eventlet => "MainProcess".to_owned(),
        }
    }

    /// Whether these children run event loops.
    pub(super) fn looped(&self) -> bool {
        self.kind == Kind::Loops
    }

    /// The index by which user code knows a child of this place.
    pub(super) fn shown_index(&self, index: u32) -> u32 {
        if self.looped() { index - loops::FIRST_PLACE + self.beside } else { index }
    }

    pub(super) fn next_number(&self) -> Number {
        self.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn signal(&self, number: Number, signal: i32, scope: Scope) {
        // Without a zygote there is no child to signal.
        let _ = self.commands.send(Command::Signal { number, signal, scope });
    }

    /// A child is up: children can live here.
    pub(super) fn up(&self) {
        self.lived.store(true, Ordering::Relaxed);
    }

    /// Whether the kernel has killed one more process of our control group for lack of memory than was known, if it
    /// tells, and how many bytes the group may have.
    pub(super) fn killings(&self) -> (Option<bool>, Option<u64>) {
        let mut killings = self.killings.lock().unwrap_or_else(PoisonError::into_inner);
        (killings.another(), killings.limit())
    }

    /// A place has failed so many times in a row to have a child. `true`: no use to try again.
    pub(super) fn failed(&self, failure: Failure, times: u32, index: u32) -> bool {
        // At the start it is the app's fault, and known at once; but one that was only slow, on a busy machine
        // perhaps, may make it the next time.
        if failure == Failure::Stillborn && !self.lived.load(Ordering::Relaxed) {
            self.broken("Could not start worker processes".to_owned());
            return true;
        }
        // A spare that cannot be had is no reason to end the child that works.
        if times >= FAILURES && !self.slots().is_served(index) {
            self.broken(format!("a worker process could not be started {times} times in a row"));
            return true;
        }
        false
    }

    /// The pool cannot go on.
    pub(super) fn broken(&self, why: String) {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.troubled.cancel();
    }

    /// The books of children with an event loop, which live under the same zygote.
    fn beside(&self, config: &PoolConfig, wear: Wear) -> Arc<Self> {
        Arc::new(Self {
            slots: Mutex::new(Slots::of_loops(config.loops, config.async_concurrency, wear)),
            commands: self.commands.clone(),
            stopping: self.stopping.clone(),
            up_within: self.up_within,
            numbers: Arc::clone(&self.numbers),
            lived: AtomicBool::new(false),
            trouble: Arc::clone(&self.trouble),
            troubled: self.troubled.clone(),
            killings: Arc::clone(&self.killings),
            kind: Kind::Loops,
            beside: config.concurrency,
        })
    }

    fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Starts a pool of Python children. Returns at once; slots come up as [`Event::Up`].
///
/// # Errors
/// When the zygote's handle cannot be used or the kind of pool is not one of ours.
pub fn start(config: &PoolConfig, zygote: ZygoteHandle, tracker: &TaskTracker) -> Result<Running, Error> {
    let (kind, places, lanes) = match config.kind.as_str() {
        "prefork" => (Kind::Prefork, config.concurrency, 1),
        "threads" => (Kind::Threads, 1, config.concurrency.max(1)),
        "solo" => (Kind::Solo, 1, 1),
        "gevent" => (Kind::Gevent, 1, config.concurrency.max(1)),
        "eventlet" => (Kind::Eventlet, 1, config.concurrency.max(1)),
        other => return Err(Error::Config(format!("worker_pool {other:?} is not run in processes"))),
    };
    let wear = match kind {
        Kind::Prefork => Wear { tasks: config.max_tasks_per_child, memory: config.max_memory_per_child },
        Kind::Threads | Kind::Solo | Kind::Gevent | Kind::Eventlet | Kind::Loops => Wear::default(),
    };
    let up_within = Duration::from_secs_f64(config.proc_alive_timeout.clamp(0.1, 86_400.0));
    let (commands, inbox) = mpsc::unbounded_channel();
    let (sender, events) = mpsc::channel(EVENT_CAPACITY);
    let (grow, growth) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        slots: Mutex::new(Slots::new(places, lanes, wear)),
        commands,
        stopping: CancellationToken::new(),
        up_within: if kind.is_green() { up_within.max(IMPORTING) } else { up_within },
        numbers: Arc::default(),
        lived: AtomicBool::new(false),
        trouble: Arc::default(),
        troubled: CancellationToken::new(),
        killings: Arc::new(Mutex::new(Killings::here())),
        kind,
        beside: 0,
    });
    let loops = (config.loops > 0).then(|| shared.beside(config, wear));
    let (zygote, orders) = zygote::open(zygote)?;
    let mut writer = JoinSet::new();
    writer.spawn(orders.run(inbox));
    let mut keeper = Keeper {
        zygote,
        writer,
        shared: Arc::clone(&shared),
        loops: loops.clone(),
        weighs: wear.memory.is_some(),
        growth,
        places: JoinSet::new(),
        events: sender,
    };
    for index in 0..places {
        keeper.place(index);
    }
    if let Some(loops) = &loops {
        for index in loops::places(config.loops) {
            keeper.places.spawn(keep(Arc::clone(loops), index, keeper.events.clone()));
        }
    }
    tracker.spawn(keeper.run());
    Ok(Running { pool: Box::new(Processes { kind, shared, loops, grow }), events })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Prefork,
    Threads,
    Solo,
    Gevent,
    Eventlet,
    /// Not a pool of its own: children with an event loop, beside those of another kind.
    Loops,
}

impl Kind {
    /// Whether tasks are greenlets of one child.
    fn is_green(self) -> bool {
        matches!(self, Self::Gevent | Self::Eventlet)
    }
}

/// Owns the zygote and the tasks of all places.
struct Keeper {
    zygote: Zygote,
    /// Passes commands on to the zygote; aborting it hangs up.
    writer: JoinSet<()>,
    shared: Arc<Shared>,
    loops: Option<Arc<Shared>>,
    /// Whether children have a memory limit.
    weighs: bool,
    growth: mpsc::UnboundedReceiver<u32>,
    places: JoinSet<()>,
    events: mpsc::Sender<Event>,
}

impl Keeper {
    fn place(&mut self, index: u32) {
        self.places.spawn(keep(Arc::clone(&self.shared), index, self.events.clone()));
    }

    async fn run(mut self) {
        let mut alive = true;
        let mut clock = tokio::time::interval(WEIGH_EVERY);
        // Stopped and no place left: all is over. A pool of no places waits for growth.
        while !(self.places.is_empty() && (self.shared.stopping.is_cancelled() || !alive)) {
            tokio::select! {
                () = self.zygote.reports(), if alive => alive = false,
                Some(index) = self.growth.recv() => self.place(index),
                Some(ended) = self.places.join_next() => self.ended(ended),
                () = self.shared.stopping.cancelled(), if self.places.is_empty() => {}
                () = self.shared.troubled.cancelled(), if self.troubled() => self.tell_trouble().await,
                _ = clock.tick(), if self.weighs => self.books().for_each(|books| books.slots().weigh_all()),
            }
            if !alive {
                self.bury().await;
                return;
            }
        }
        for event in abandoned(&self.shared, self.loops.as_ref()) {
            let _ = self.events.send(event).await;
        }
        self.writer.shutdown().await;
        self.zygote.end().await;
    }

    /// Those of the pool and those of event loops.
    fn books(&self) -> impl Iterator<Item = &Arc<Shared>> {
        std::iter::once(&self.shared).chain(&self.loops)
    }

    fn troubled(&self) -> bool {
        self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    async fn tell_trouble(&self) {
        if let Some(why) = self.shared.trouble() {
            let _ = self.events.send(Event::Broken(why)).await;
        }
    }

    fn ended(&self, ended: Result<(), tokio::task::JoinError>) {
        if let Err(error) = ended {
            tracing::error!(target: "celery.pool", %error, "The owner of a child panicked: a bug of celeriac.");
            self.shared.broken(format!("internal error: {error}"));
        }
    }

    /// The zygote is dead and its children die with it. This process has threads and must not fork, so the
    /// worker has to end and be started again.
    async fn bury(self) {
        let Self { zygote, mut writer, shared, loops, mut places, events, .. } = self;
        writer.shutdown().await;
        // With the zygote go the channels of its reports: every place learns of it.
        let status = zygote.end().await;
        while places.join_next().await.is_some() {}
        for event in abandoned(&shared, loops.as_ref()) {
            let _ = events.send(event).await;
        }
        if !shared.stopping.is_cancelled() {
            let why = format!(
                "the process that forks the children (zygote) died with {status}, and the children with it: \
                 the worker ends and must be started again"
            );
            let _ = events.send(Event::Broken(why)).await;
        }
    }
}

/// What no child has read.
fn abandoned(shared: &Shared, loops: Option<&Arc<Shared>>) -> Vec<Event> {
    let mut events = shared.slots().abandoned();
    events.extend(loops.into_iter().flat_map(|loops| loops.slots().abandoned()));
    events
}

/// The worker's handle.
struct Processes {
    kind: Kind,
    shared: Arc<Shared>,
    /// Children with an event loop, where the app has tasks for them.
    loops: Option<Arc<Shared>>,
    grow: mpsc::UnboundedSender<u32>,
}

impl Processes {
    /// The child that waits for a store.
    fn waiting(&self, store: StoreId) -> Option<Arc<Link>> {
        let looped = self.loops.as_ref().and_then(|loops| loops.slots().waiting(store));
        looped.or_else(|| self.shared.slots().waiting(store))
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.stop(Instant::now());
    }
}

impl Pool for Processes {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Prefork => "prefork",
            Kind::Threads => "threads",
            Kind::Solo => "solo",
            Kind::Gevent => "gevent",
            Kind::Eventlet => "eventlet",
            Kind::Loops => "loops",
        }
    }

    fn interrupts(&self) -> bool {
        self.kind == Kind::Prefork || self.kind.is_green()
    }

    fn limits(&self, (hard, soft): (Option<f64>, Option<f64>)) -> (Option<f64>, Option<f64>) {
        // As in Celery: greenlets know no soft limit, those of eventlet none at all.
        match self.kind {
            Kind::Prefork | Kind::Loops => (hard, soft),
            Kind::Gevent => (hard, None),
            Kind::Threads | Kind::Solo | Kind::Eventlet => (None, None),
        }
    }

    fn capacity(&self) -> usize {
        self.shared.slots().capacity()
    }

    fn idle(&self) -> usize {
        self.shared.slots().idle()
    }

    fn pids(&self) -> Vec<u32> {
        let mut pids = self.shared.slots().pids();
        if let Some(loops) = &self.loops {
            pids.extend(loops.slots().pids());
        }
        pids
    }

    fn loop_slots(&self) -> usize {
        self.loops.as_ref().map_or(0, |loops| loops.slots().capacity())
    }

    fn idle_loops(&self) -> usize {
        self.loops.as_ref().map_or(0, |loops| loops.slots().idle())
    }

    fn submit_to_loop(&mut self, job: Job) -> Result<(SlotId, u32), Box<Job>> {
        match &self.loops {
            Some(loops) => loops.slots().submit(Box::new(job)),
            None => Err(Box::new(job)),
        }
    }

    fn submit(&mut self, job: Job) -> Result<(SlotId, u32), Box<Job>> {
        self.shared.slots().submit(Box::new(job))
    }

    fn interrupt(&mut self, job: JobId, how: Interrupt) {
        if !self.interrupts() {
            return;
        }
        if let Some(loops) = &self.loops
            && loops.slots().cancel(job, how, Instant::now() + TERMINATE_GRACE)
        {
            return;
        }
        if self.kind.is_green() {
            // The others that run there must not suffer.
            let limit = match how {
                Interrupt::SoftLimit => return,
                Interrupt::HardLimit(limit) => Some(limit),
                Interrupt::Terminate(_) => None,
            };
            let link = self.shared.slots().owner(job);
            if let Some(link) = link {
                link.send(&ToChild::Interrupt { job, limit });
            }
            return;
        }
        let (signal, scope, grace) = match how {
            Interrupt::SoftLimit => (10, Scope::Process, Duration::ZERO),
            Interrupt::HardLimit(_) => (15, Scope::Group, HARD_GRACE),
            Interrupt::Terminate(signal) => (signal, Scope::Process, TERMINATE_GRACE),
        };
        let number = self.shared.slots().interrupt(job, how, Instant::now() + grace);
        if let Some(number) = number {
            self.shared.signal(number, signal, scope);
        }
    }

    fn stored(&mut self, store: StoreId, error: Option<String>) {
        let link = self.waiting(store);
        if let Some(link) = link {
            link.send(&ToChild::Stored { serial: store.serial, error });
        }
    }

    fn counted(&mut self, store: StoreId, counted: Counted) {
        let link = self.waiting(store);
        if let Some(link) = link {
            link.send(&ToChild::Counted { serial: store.serial, counted });
        }
    }

    fn grow(&mut self, by: usize) {
        if self.kind.is_green() {
            self.shared.slots().widen(u32::try_from(by).unwrap_or(u32::MAX));
            return;
        }
        if self.kind != Kind::Prefork {
            tracing::warn!(target: "celery.pool", "A pool of {} cannot grow.", self.name());
            return;
        }
        for index in self.shared.slots().grow(by) {
            // The keeper is gone only when the pool is over.
            let _ = self.grow.send(index);
        }
    }

    fn shrink(&mut self, by: usize) {
        if self.kind.is_green() {
            self.shared.slots().narrow(u32::try_from(by).unwrap_or(u32::MAX));
            return;
        }
        if self.kind != Kind::Prefork {
            tracing::warn!(target: "celery.pool", "A pool of {} cannot shrink.", self.name());
            return;
        }
        self.shared.slots().shrink(by);
    }

    fn restart(&mut self, reload: Reload) -> Result<(), String> {
        // The zygote carries out its orders one after the other: what is forked from now on has the modules.
        let _ = self.shared.commands.send(Command::Reload(reload));
        self.shared.slots().restart();
        if let Some(loops) = &self.loops {
            loops.slots().restart();
        }
        Ok(())
    }

    fn stop(&mut self, deadline: Instant) {
        self.shared.slots().stop(deadline);
        if let Some(loops) = &self.loops {
            loops.slots().stop(deadline);
        }
        self.shared.stopping.cancel();
    }
}
