//! A pool whose jobs end when the test says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use celeriac::backend::Record;
use celeriac::broker::Publication;
use celeriac::pool::{Event, Interrupt, Job, JobId, Outcome, Pool, Running, SlotId, StoreId};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::DEADLINE;

/// What the worker asked of the pool.
#[derive(Debug)]
pub(crate) enum Asked {
    Run(Box<Job>),
    Interrupt(JobId, Interrupt),
    Stored(StoreId, Option<String>),
}

struct Scripted {
    slots: usize,
    idle: Arc<AtomicUsize>,
    asked: mpsc::UnboundedSender<Asked>,
    events: Option<mpsc::Sender<Event>>,
}

impl Pool for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn interrupts(&self) -> bool {
        true
    }

    fn capacity(&self) -> usize {
        self.slots
    }

    fn idle(&self) -> usize {
        self.idle.load(Ordering::SeqCst)
    }

    fn pids(&self) -> Vec<u32> {
        vec![1]
    }

    fn submit(&mut self, job: Job) -> Result<(SlotId, u32), Box<Job>> {
        if self.idle() == 0 {
            return Err(Box::new(job));
        }
        self.idle.fetch_sub(1, Ordering::SeqCst);
        self.asked.send(Asked::Run(Box::new(job))).unwrap();
        Ok((0, 1))
    }

    fn interrupt(&mut self, job: JobId, how: Interrupt) {
        self.asked.send(Asked::Interrupt(job, how)).unwrap();
    }

    fn stored(&mut self, store: StoreId, error: Option<String>) {
        self.asked.send(Asked::Stored(store, error)).unwrap();
    }

    fn grow(&mut self, by: usize) {
        self.slots += by;
    }

    fn shrink(&mut self, by: usize) {
        self.slots -= by;
    }

    fn stop(&mut self, _deadline: Instant) {
        self.events = None;
    }
}

/// The test's end of the pool.
pub(crate) struct Driver {
    idle: Arc<AtomicUsize>,
    asked: mpsc::UnboundedReceiver<Asked>,
    events: mpsc::WeakSender<Event>,
}

/// A pool of so many slots, all up.
pub(crate) async fn scripted(slots: usize) -> (Running, Driver) {
    let (asked_tx, asked) = mpsc::unbounded_channel();
    let (events_tx, events) = mpsc::channel(64);
    let idle = Arc::new(AtomicUsize::new(slots));
    events_tx.send(Event::Up { slot: 0, pid: 1 }).await.unwrap();
    let driver = Driver { idle: idle.clone(), asked, events: events_tx.downgrade() };
    let pool = Scripted { slots, idle, asked: asked_tx, events: Some(events_tx) };
    (Running { pool: Box::new(pool), events }, driver)
}

impl Driver {
    async fn asked(&mut self, what: &str) -> Asked {
        let asked = timeout(DEADLINE, self.asked.recv()).await;
        asked.unwrap_or_else(|_| panic!("waited in vain for {what}")).expect("the worker is alive")
    }

    /// The next job.
    pub(crate) async fn job(&mut self) -> Job {
        match self.asked("a job").await {
            Asked::Run(job) => *job,
            other => panic!("a job was due, the worker asked for {other:?}"),
        }
    }

    /// The next interrupt.
    pub(crate) async fn interrupt(&mut self) -> (JobId, Interrupt) {
        match self.asked("an interrupt").await {
            Asked::Interrupt(job, how) => (job, how),
            other => panic!("an interrupt was due, the worker asked for {other:?}"),
        }
    }

    /// The next answer to a child that waits for a store.
    pub(crate) async fn stored(&mut self) -> (StoreId, Option<String>) {
        match self.asked("an answer").await {
            Asked::Stored(store, error) => (store, error),
            other => panic!("an answer was due, the worker asked for {other:?}"),
        }
    }

    async fn tell(&self, event: Event) {
        let events = self.events.upgrade().expect("the pool is not stopped");
        events.send(event).await.unwrap();
    }

    /// The child has decoded the job and starts it.
    pub(crate) async fn accept(&self, job: &Job) {
        self.tell(Event::Accepted { job: job.id }).await;
    }

    /// The child stores a result.
    pub(crate) async fn store(&self, job: &Job, record: Record, confirm: Option<StoreId>) {
        self.tell(Event::Store { job: job.id, record, confirm }).await;
    }

    /// The child hands over what follows its job.
    pub(crate) async fn publish(&self, job: &Job, publication: Publication) {
        self.tell(Event::Publish { job: job.id, publication: Box::new(publication), confirm: None }).await;
    }

    /// The job ends and its slot is idle again.
    pub(crate) async fn end(&self, job: &Job, outcome: Outcome) {
        self.idle.fetch_add(1, Ordering::SeqCst);
        self.tell(Event::Ended { job: job.id, outcome }).await;
    }

    /// The call returned this.
    pub(crate) async fn answer(&self, job: &Job, value: &'static str) {
        self.tell(Event::Answered { job: job.id, value: value.into() }).await;
        self.succeed(job).await;
    }

    /// It returned.
    pub(crate) async fn succeed(&self, job: &Job) {
        self.end(job, Outcome::Success { result: "10".to_owned(), runtime: 0.001 }).await;
    }
}
