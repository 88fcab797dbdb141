//! A pool whose slots are futures on the runtime that it is made on.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::body::{self, Refused};
use super::context::TaskContext;
use super::error::TaskError;
use super::extract::{Arguments, Call, States};
use super::results::{Owner, Results};
use crate::pool::{EVENT_CAPACITY, Event, Interrupt, Job, JobId, Outcome, Pool, Running, SlotId, StoreId};
use crate::protocol::{TaskHeaders, json, repr};

/// Logger of how tasks end.
const TRACE: &str = "celery.app.trace";

/// A handler without its type.
pub(super) type Run = Box<dyn Fn(Call) -> BoxFuture<'static, Result<String, TaskError>> + Send + Sync>;

/// A registered task.
pub(super) struct Task {
    /// Runs it.
    pub(super) run: Run,
    /// `ignore_result`, where the message does not say.
    pub(super) ignore_result: bool,
}

/// What all jobs share.
pub(super) struct App {
    /// Tasks by name.
    pub(super) tasks: HashMap<String, Task>,
    /// Values for [`super::State`].
    pub(super) states: Arc<States>,
    /// How results are written; none: nowhere.
    pub(super) results: Option<Results>,
    /// Node name.
    pub(super) node: String,
}

/// Slots and what runs in them.
#[derive(Default)]
struct Slots {
    idle: Vec<SlotId>,
    busy: HashMap<JobId, (SlotId, Option<oneshot::Sender<Interrupt>>)>,
    /// Busy slots that are gone when their job is.
    leaving: HashSet<SlotId>,
    last: SlotId,
}

struct NativePool {
    app: Arc<App>,
    slots: Arc<Mutex<Slots>>,
    events: Option<mpsc::Sender<Event>>,
    jobs: TaskTracker,
    /// Ends what still runs at the deadline, or when the pool is dropped.
    kill: CancellationToken,
    helpers: JoinSet<()>,
}

/// Starts a pool of `capacity` slots.
pub(super) fn start(app: App, capacity: usize) -> Running {
    let (events, receiver) = mpsc::channel(EVENT_CAPACITY);
    let mut pool = NativePool {
        app: Arc::new(app),
        slots: Arc::default(),
        events: Some(events),
        jobs: TaskTracker::new(),
        kill: CancellationToken::new(),
        helpers: JoinSet::new(),
    };
    pool.grow(capacity);
    Running { pool: Box::new(pool), events: receiver }
}

fn lock(slots: &Mutex<Slots>) -> MutexGuard<'_, Slots> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool for NativePool {
    fn name(&self) -> &'static str {
        "native"
    }

    fn interrupts(&self) -> bool {
        true
    }

    fn capacity(&self) -> usize {
        let slots = lock(&self.slots);
        slots.idle.len() + slots.busy.len() - slots.leaving.len()
    }

    fn idle(&self) -> usize {
        if self.events.is_none() { 0 } else { lock(&self.slots).idle.len() }
    }

    fn pids(&self) -> Vec<u32> {
        vec![std::process::id()]
    }

    fn submit(&mut self, job: Job) -> Result<(SlotId, u32), Box<Job>> {
        let Some(events) = self.events.clone() else { return Err(Box::new(job)) };
        let (interrupt, interrupted) = oneshot::channel();
        let slot = {
            let mut slots = lock(&self.slots);
            let Some(slot) = slots.idle.pop() else { return Err(Box::new(job)) };
            slots.busy.insert(job.id, (slot, Some(interrupt)));
            slot
        };
        let (app, slots, kill) = (self.app.clone(), self.slots.clone(), self.kill.clone());
        self.jobs.spawn(async move {
            let id = job.id;
            let outcome = run(&app, job, &events, interrupted, kill).await;
            // The slot is idle before the worker hears of the end: it fills slots when it does.
            let gone = {
                let mut slots = lock(&slots);
                slots.busy.remove(&id);
                let gone = slots.leaving.remove(&slot);
                if !gone {
                    slots.idle.push(slot);
                }
                gone
            };
            // The worker may be gone; then nobody is left to be told.
            let _ = events.send(Event::Ended { job: id, outcome }).await;
            if gone {
                let _ = events.send(Event::Down { slot }).await;
            }
        });
        Ok((slot, std::process::id()))
    }

    fn interrupt(&mut self, job: JobId, how: Interrupt) {
        if let Some(interrupt) =
            lock(&self.slots).busy.get_mut(&job).and_then(|(_, interrupt)| interrupt.take())
        {
            // It may have just ended.
            let _ = interrupt.send(how);
        }
    }

    fn stored(&mut self, _store: StoreId, _error: Option<String>) {
        // No handler waits for a store.
    }

    fn grow(&mut self, by: usize) {
        let Some(events) = self.events.clone() else { return };
        let added: Vec<SlotId> = {
            let mut slots = lock(&self.slots);
            (0..by)
                .map(|_| {
                    slots.last += 1;
                    let slot = slots.last;
                    slots.idle.push(slot);
                    slot
                })
                .collect()
        };
        self.helpers.spawn(async move {
            for slot in added {
                if events.send(Event::Up { slot, pid: std::process::id() }).await.is_err() {
                    break;
                }
            }
        });
    }

    fn shrink(&mut self, by: usize) {
        let Some(events) = self.events.clone() else { return };
        let gone: Vec<SlotId> = {
            let mut slots = lock(&self.slots);
            let left = slots.idle.len().saturating_sub(by);
            let gone = slots.idle.split_off(left);
            let busy: Vec<SlotId> = slots.busy.values().map(|(slot, _)| *slot).collect();
            let staying: Vec<SlotId> =
                busy.into_iter().filter(|slot| !slots.leaving.contains(slot)).take(by - gone.len()).collect();
            slots.leaving.extend(staying);
            gone
        };
        self.helpers.spawn(async move {
            for slot in gone {
                if events.send(Event::Down { slot }).await.is_err() {
                    break;
                }
            }
        });
    }

    fn stop(&mut self, deadline: Instant) {
        // The channel closes with the last job's sender.
        self.events = None;
        self.jobs.close();
        let (jobs, kill) = (self.jobs.clone(), self.kill.clone());
        self.helpers.spawn(async move {
            if tokio::time::timeout_at(deadline, jobs.wait()).await.is_err() {
                kill.cancel();
            }
        });
    }
}

impl Drop for NativePool {
    fn drop(&mut self) {
        self.kill.cancel();
    }
}

/// Runs one job to its end.
async fn run(
    app: &App,
    job: Job,
    events: &mpsc::Sender<Event>,
    interrupted: oneshot::Receiver<Interrupt>,
    kill: CancellationToken,
) -> Outcome {
    let headers: TaskHeaders = match serde_json::from_slice(job.headers.as_bytes()) {
        Ok(headers) => headers,
        Err(error) => return Outcome::Malformed { reason: Some(error.to_string()) },
    };
    let body = match body::decode(&job.content_type, &job.headers, &job.body) {
        Ok(body) => body,
        Err(Refused::Undecodable(reason)) => return Outcome::Undecodable { reason },
        Err(Refused::Malformed(reason)) => return Outcome::Malformed { reason: Some(reason) },
    };
    if job.acks_early {
        let _ = events.send(Event::Accepted { job: job.id }).await;
    }
    let trace = Trace { app, job: &job, headers: &headers, arguments: &body.arguments, events };
    let Some(task) = app.tasks.get(&job.task) else {
        return trace.failed(&unregistered(&job.task), 0.0).await;
    };
    if !body.continuations.is_empty() {
        let what = body.continuations.join(", ");
        let error = format!("native tasks do not continue workflows yet ({what}); the task was not run");
        return trace.failed(&TaskError::new("NotImplementedError", error), 0.0).await;
    }
    let call = Call {
        context: context(app, &job, &headers),
        arguments: body.arguments.clone(),
        states: app.states.clone(),
    };
    let started = Instant::now();
    // The call itself may panic too: a handler need not be an `async fn`.
    let running = AssertUnwindSafe(async move { (task.run)(call).await }).catch_unwind();
    let ended = tokio::select! {
        // A task that is done when it is interrupted is done.
        biased;
        ended = running => ended,
        how = interrupted => match how {
            Ok(Interrupt::HardLimit(limit)) => return Outcome::TimedOut { limit },
            Ok(Interrupt::Terminate(_)) | Err(_) => return Outcome::Terminated,
            Ok(Interrupt::SoftLimit) => {
                Ok(Err(TaskError::with_arguments("billiard.exceptions.SoftTimeLimitExceeded", Vec::new())))
            }
        },
        () = kill.cancelled() => return Outcome::Terminated,
    };
    let runtime = started.elapsed().as_secs_f64();
    match ended {
        Ok(Ok(result)) => trace.succeeded(&result, runtime).await,
        Ok(Err(error)) => trace.failed(&error, runtime).await,
        Err(panic) => trace.failed(&panicked(panic.as_ref()), runtime).await,
    }
}

fn unregistered(task: &str) -> TaskError {
    TaskError::new("celery.exceptions.NotRegistered", task)
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> TaskError {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    TaskError::new("Panic", text.unwrap_or_else(|| "the handler panicked".to_owned()))
}

fn context(app: &App, job: &Job, headers: &TaskHeaders) -> TaskContext {
    TaskContext {
        id: headers.id.clone(),
        task: headers.task.clone(),
        retries: headers.retries.unwrap_or(0),
        root_id: headers.root_id.clone(),
        parent_id: headers.parent_id.clone(),
        group_id: headers.group.clone(),
        delivery_info: job.info.clone(),
        hostname: app.node.clone(),
        headers: job.headers.clone(),
    }
}

/// Stores how a job ended, logs it, and says it to the worker.
struct Trace<'a> {
    app: &'a App,
    job: &'a Job,
    headers: &'a TaskHeaders,
    arguments: &'a Arguments,
    events: &'a mpsc::Sender<Event>,
}

impl Trace<'_> {
    async fn succeeded(&self, result: &str, runtime: f64) -> Outcome {
        self.store("SUCCESS", result, None).await;
        let shown = repr::saferepr(result, Some(repr::LENGTH), repr::LEVELS).unwrap_or_default();
        let seconds = json::float(runtime);
        tracing::info!(target: TRACE, "Task {} succeeded in {seconds}s: {shown}", self.human());
        Outcome::Success { result: shown, runtime }
    }

    async fn failed(&self, error: &TaskError, runtime: f64) -> Outcome {
        let (exception, traceback) = (error.exception.repr(), error.traceback());
        self.store("FAILURE", &error.exception.document(), Some(&traceback)).await;
        tracing::error!(target: TRACE, "Task {} raised unexpected: {exception}\n{traceback}", self.human());
        Outcome::Failure { exception, traceback, runtime }
    }

    async fn store(&self, state: &str, result: &str, traceback: Option<&str>) {
        let by_task = self.app.tasks.get(&self.job.task).is_some_and(|task| task.ignore_result);
        if self.headers.ignore_result.unwrap_or(by_task) {
            return;
        }
        let owner = Owner {
            headers: self.headers,
            properties: &self.job.properties,
            info: &self.job.info,
            arguments: Some(self.arguments),
        };
        let record =
            self.app.results.as_ref().and_then(|results| results.record(&owner, state, result, traceback));
        if let Some(record) = record {
            let _ = self.events.send(Event::Store { job: self.job.id, record, confirm: None }).await;
        }
    }

    fn human(&self) -> String {
        format!("{}[{}]", self.headers.display_name(), self.headers.id)
    }
}

#[cfg(test)]
mod tests;
