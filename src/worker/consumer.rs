//! The loop: deliveries in, jobs to the pool, outcomes and settlements back. State has this one owner; everything
//! else sends it messages. It decides through the pure modules beside it and never waits for anything but events.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Exit;
use super::announce::{Events, Subject};
use super::asking::Asked;
use super::autoscale::Autoscaler;
use super::continuations::Continuations;
use super::dispatch::Rules;
use super::hooks::{Hooks, Notice, Unstarted};
use super::hosting::Desk;
use super::jobs::{Jobs, Running};
use super::link::{Link, LinkEvent};
use super::neighbours::Neighbours;
use super::ready::{self, Lane, Ready};
use super::request::Request;
use super::results::{Write, Written};
use super::revoked::{Bounds, RevokedTasks};
use super::schedule::{Due, RateLimits};
use super::shutdown::{Cause, Phase, Shutdown};
use super::told::Account;
use crate::broker::reconnect::Why;
use crate::broker::{self, Command, Handle, Settlement, Tag};
use crate::clock;
use crate::cluster::clock::LamportClock;
use crate::cluster::events::Dispatcher;
use crate::config::Config;
use crate::error::{BrokerError, Error};
use crate::metrics::Counts;
use crate::pool::{self, JobId, Pool};
use crate::probes::Seat;
use crate::protocol::{DeliveryInfo, Message, TaskHeaders};

/// Requests that may wait for their turn under a rate limit without being counted as prefetched, so that others behind
/// them are fetched. Bounded: what waits here cannot run on another worker that has turns to give.
const MOST_LIMITED: u32 = 256;
/// Results that may wait for the backend before no further task is started.
const MOST_UNWRITTEN: usize = 10_000;
/// Longest sleep of the timer; the wall clock may step.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// What goes on, in the order in which it came, when the app has been told of the tasks before it.
#[derive(Debug)]
pub(super) enum Received {
    /// That the app was just told of.
    Task(Box<Request>),
    /// That the app can make nothing of, and how it is settled.
    Refused(Box<Request>, Settlement),
    /// Of remote control.
    Command(Message),
}

/// A request that waits for its time.
#[derive(Debug)]
pub(super) enum Waiting {
    /// For its `eta`, counted as one more prefetched message.
    Eta(Box<Request>),
    /// For its turn under a rate limit.
    Limited(Box<Request>),
    /// For its `eta`, in the broker. `shown`: what `inspect scheduled` shows of it, where that is still kept.
    Parked { tag: Tag, shown: Option<Box<Shown>> },
}

/// What is kept of a parked request.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) headers: Box<TaskHeaders>,
    pub(super) message: Message,
    pub(super) info: DeliveryInfo,
}

/// A report that was carried out.
pub(super) struct Reported {
    pub(super) job: Option<JobId>,
    pub(super) refused: Option<(Handle, Settlement)>,
    pub(super) subject: Subject,
    pub(super) account: Account,
}

/// The channels that the loop listens on besides link and pool.
pub(super) struct Inbox {
    pub(super) pool: mpsc::Receiver<pool::Event>,
    pub(super) written: mpsc::UnboundedReceiver<Written>,
    pub(super) causes: mpsc::UnboundedReceiver<Cause>,
}

pub(super) struct Consumer {
    pub(super) config: Config,
    pub(super) rules: Rules,
    pub(super) link: Link,
    pub(super) pool: Box<dyn Pool>,
    pub(super) hooks: Arc<dyn Hooks>,
    pub(super) writes: Option<mpsc::UnboundedSender<Write>>,
    pub(super) ready: Ready,
    pub(super) waiting: Due<Waiting>,
    /// Parked requests that were asked for: they were received before.
    pub(super) returning: HashSet<Tag>,
    pub(super) rate_limits: RateLimits,
    pub(super) jobs: Jobs,
    pub(super) counts: Counts,
    /// Where the listener of probes and metrics asks.
    pub(super) seat: Seat,
    pub(super) shutdown: Shutdown,
    pub(super) prefetch: u32,
    pub(super) autoscaler: Option<Autoscaler>,
    pub(super) clock: LamportClock,
    pub(super) revoked: RevokedTasks,
    /// Rate limits that were changed, as they were given.
    pub(super) rate_texts: HashMap<String, Option<String>>,
    /// Revoked tasks that the app is to store as such before the reply is sent.
    pub(super) storing: Vec<Unstarted>,
    /// Results that the backend does not have yet.
    pub(super) unwritten: usize,
    pub(super) reports: JoinSet<Reported>,
    pub(super) continuing: Continuations,
    pub(super) asking: JoinSet<Asked>,
    pub(super) receiving: FuturesOrdered<BoxFuture<'static, Received>>,
    /// Messages that the app's own objects decide about.
    pub(super) desk: Desk,
    pub(super) events: Events,
    pub(super) neighbours: Neighbours,
    pub(super) etas: u32,
    pub(super) limited: u32,
    /// The last that the broker was told; none: to fetch nothing.
    told_prefetch: Option<u32>,
    /// How much of it is for event loops.
    loop_window: u32,
    started: Instant,
    pub(super) started_at: f64,
    pub(super) stop_until: Option<Instant>,
    pub(super) slots_up: usize,
    pub(super) connected: bool,
    pub(super) ready_told: bool,
    pub(super) broken: Option<String>,
}

impl Consumer {
    pub(super) fn new(
        config: Config,
        link: Link,
        pool: Box<dyn Pool>,
        hooks: Arc<dyn Hooks>,
        writes: Option<mpsc::UnboundedSender<Write>>,
        seat: Seat,
    ) -> Result<Self, Error> {
        let rules = Rules::of(&config)?;
        let bounds = Bounds::from_env(|name| std::env::var(name).ok()).map_err(Error::Config)?;
        let prefetch = config.prefetch();
        let mut revoked = RevokedTasks::new(bounds);
        config.revoked.iter().for_each(|id| revoked.insert(id, Instant::now()));
        let clock = LamportClock::at(config.clock);
        let desk = Desk::new(hooks.as_ref());
        let autoscaler = config.autoscale.as_ref().map(|config| Autoscaler::new(config, Instant::now()));
        let dispatcher = config
            .events
            .as_ref()
            .map(|events| Dispatcher::new(events.clone(), &config.hostname, std::process::id()));
        let neighbours = Neighbours::new(&config.hostname, config.cluster.gossip.is_some());
        let mut consumer = Self {
            config,
            rules,
            link,
            pool,
            hooks,
            writes,
            ready: Ready::default(),
            waiting: Due::default(),
            returning: HashSet::new(),
            rate_limits: RateLimits::default(),
            jobs: Jobs::default(),
            counts: Counts::default(),
            seat,
            shutdown: Shutdown::default(),
            prefetch,
            autoscaler,
            clock,
            revoked,
            rate_texts: HashMap::new(),
            storing: Vec::new(),
            unwritten: 0,
            reports: JoinSet::new(),
            continuing: Continuations::new(),
            asking: JoinSet::new(),
            receiving: FuturesOrdered::new(),
            desk,
            events: Events::new(dispatcher),
            neighbours,
            etas: 0,
            limited: 0,
            told_prefetch: Some(prefetch),
            loop_window: 0,
            started: Instant::now(),
            started_at: clock::now(),
            stop_until: None,
            slots_up: 0,
            connected: false,
            ready_told: false,
            broken: None,
        };
        // Before the first connection, which is told of it.
        consumer.tell_prefetch();
        Ok(consumer)
    }

    /// Runs until the worker is to end and nothing is left to do.
    pub(super) async fn run(&mut self, inbox: &mut Inbox) -> Exit {
        loop {
            self.seat.turned();
            self.autoscale();
            self.pump();
            self.announce();
            self.link.flush();
            if self.is_over() {
                break;
            }
            let until = self.next_due();
            tokio::select! {
                event = self.link.next() => self.on_link(event),
                event = inbox.pool.recv() => self.on_pool_events(event, &mut inbox.pool),
                Some(written) = inbox.written.recv() => self.on_written(written),
                Some(told) = self.continuing.next() => self.on_continued(told),
                Some(reported) = self.reports.join_next() => self.on_reported(reported),
                Some(received) = self.receiving.next() => self.on_received(received),
                Some(order) = self.desk.orders.recv() => self.on_order(order),
                Some(done) = self.desk.asking.join_next() => self.on_done(done),
                Some(asked) = self.asking.join_next() => self.on_asked(asked),
                Some(announced) = self.events.sending.next() => self.on_announced(announced),
                Some(cause) = inbox.causes.recv() => self.on_cause(cause),
                Some(question) = self.seat.questions.recv() => self.on_question(question),
                () = tokio::time::sleep_until(until) => self.on_due(),
            }
        }
        self.stop_beating();
        // Whoever waits for an answer hears that there will be none.
        self.desk.orders.close();
        while self.desk.orders.try_recv().is_ok() {}
        self.hooks.notice(Notice::Over { clock: self.clock.value() });
        Exit { code: self.shutdown.exit_code, restart: self.shutdown.restart, broken: self.broken.take() }
    }

    pub(super) fn uptime(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn next_due(&self) -> Instant {
        let mut sleep = LONGEST_SLEEP;
        if let Some(at) = self.waiting.next() {
            sleep = sleep.min(Duration::try_from_secs_f64(at - clock::now()).unwrap_or_default());
        }
        for at in self.neighbours.next_due().into_iter().chain(self.events.next_due()) {
            sleep = sleep.min(at.saturating_duration_since(Instant::now()));
        }
        if let Some(at) = self.jobs.next_limit() {
            sleep = sleep.min(Duration::try_from_secs_f64(at - self.uptime()).unwrap_or_default());
        }
        if let Some(at) = self.desk.next_limit() {
            sleep = sleep.min(Duration::try_from_secs_f64(at - self.uptime()).unwrap_or_default());
        }
        let until = Instant::now() + sleep;
        let check = self.autoscaler.as_ref().map(Autoscaler::check_at).filter(|_| self.is_running());
        [self.stop_until, check].into_iter().flatten().fold(until, Instant::min)
    }

    // --- the broker -----------------------------------------------------------------------------------

    fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { address, moved } => {
                if moved {
                    self.drop_unstarted();
                }
                tracing::info!(target: "celery.worker.consumer.connection", "Connected to {address}");
                self.connected = true;
                self.counts.connections += 1;
                if self.config.disable_prefetch && !self.link.broker().capabilities().parks {
                    let transport = address.split("://").next().unwrap_or_default();
                    tracing::warn!(
                        target: "celery.worker.consumer.tasks",
                        "worker_disable_prefetch is only supported for Redis brokers. Current broker transport: \
                         {transport}. Ignoring disable_prefetch setting."
                    );
                }
                self.tell_prefetch();
                self.hooks.notice(Notice::Connected { address });
                self.meet_neighbours();
                if self.ready_told {
                    self.begin_to_beat();
                }
                self.tell_ready();
            }
            LinkEvent::Failed { address, error, wait, attempt, most } => {
                self.counts.connection_failures += 1;
                let most = most.map_or_else(|| "∞".to_owned(), |most| most.to_string());
                let then = if wait.is_zero() {
                    "Will retry using next failover.".to_owned()
                } else {
                    format!("Trying again in {:.2} seconds... ({attempt}/{most})", wait.as_secs_f64())
                };
                tracing::error!(
                    target: "celery.worker.consumer.consumer",
                    "consumer: Cannot connect to {address}: {}.\n{then}\n",
                    error.reason()
                );
            }
            LinkEvent::Lost(error) => {
                tracing::warn!(
                    target: "celery.worker.consumer.consumer",
                    "consumer: Connection to broker lost. Trying to re-establish the connection... ({})",
                    error.reason()
                );
                self.on_lost();
            }
            LinkEvent::GaveUp(error, why) => self.on_gave_up(&error, why),
            LinkEvent::Broker(broker::Event::Deliveries(deliveries)) => {
                deliveries.into_iter().for_each(|delivery| self.on_delivery(delivery));
            }
            LinkEvent::Broker(broker::Event::Control(message)) => self.on_control(message),
            LinkEvent::Broker(broker::Event::Heard(heard)) => self.on_heard(heard),
            LinkEvent::Broker(broker::Event::Remembered(ids)) => self.recall(ids),
            LinkEvent::Broker(broker::Event::Forgotten(tags)) => {
                for tag in &tags {
                    self.returning.remove(tag);
                }
                self.counts.leases_lost += tags.len() as u64;
                tracing::warn!(
                    target: "celery.worker",
                    count = tags.len(),
                    "The broker gave messages of ours to somebody else, because this worker was silent for too long; they may run twice."
                );
            }
            LinkEvent::Broker(broker::Event::Renewed(count)) => self.counts.lease_renewals += count as u64,
            // The link ends with it and says `LinkEvent::Lost`.
            LinkEvent::Broker(broker::Event::Lost(_)) => {}
        }
    }

    fn on_gave_up(&mut self, error: &BrokerError, why: Why) {
        let reason = match why {
            Why::Refused => error.to_string(),
            Why::Exhausted => format!("{error} (broker_connection_max_retries is used up)"),
            Why::Disabled { setting } => {
                let again = if self.ready_told { "re-establish" } else { "establish" };
                tracing::error!(
                    target: "celery.worker.consumer.consumer",
                    "Retrying to {again} a connection to the message broker after a connection loss has been disabled \
                     (app.conf.{setting}=False). Shutting down..."
                );
                error.to_string()
            }
        };
        tracing::error!(target: "celery.worker", "Unrecoverable error: {reason}");
        self.on_lost();
        self.broken = Some(reason);
        self.on_cause(Cause::Failure);
    }

    /// What came over a connection that the broker does not remember is no longer ours.
    fn on_lost(&mut self) {
        if self.connected {
            self.hooks.notice(Notice::Lost);
        }
        self.connected = false;
        if !self.link.broker().capabilities().settles_across_sessions {
            self.drop_unstarted();
        }
        if self.config.shutdown.cancel_on_connection_loss {
            let late: Vec<JobId> =
                self.jobs.active().filter(|(_, job)| !job.acknowledged).map(|(id, _)| id).collect();
            self.kill(&late);
            self.kill_calls();
        }
    }

    /// What the broker no longer knows as ours is dropped before it starts; it comes again.
    pub(super) fn drop_unstarted(&mut self) {
        let mut unstarted: Vec<Request> = self.ready.drain();
        for waiting in self.waiting.drain() {
            if let Waiting::Eta(request) | Waiting::Limited(request) = waiting {
                unstarted.push(*request);
            }
        }
        for request in unstarted {
            self.forget(&request);
            request.handle.abandon();
        }
        self.returning.clear();
        (self.etas, self.limited) = (0, 0);
    }

    fn on_due(&mut self) {
        let now = clock::now();
        let mut parked = Vec::new();
        while let Some(waiting) = self.waiting.pop(now) {
            match waiting {
                Waiting::Eta(request) => {
                    self.etas -= 1;
                    self.take_turn(*request, now);
                }
                Waiting::Limited(request) => {
                    self.limited -= 1;
                    self.ready.push_back(*request);
                }
                Waiting::Parked { tag, .. } => parked.push(tag),
            }
        }
        if !parked.is_empty() {
            self.returning.extend(&parked);
            self.link.send(Command::Unpark(parked));
        }
        self.beat_if_due();
        self.look_for_neighbours();
        let uptime = self.uptime();
        while let Some((id, limit)) = self.jobs.limit_due(uptime) {
            self.on_limit(id, limit);
        }
        self.on_call_limits();
        if self.stop_until.is_some_and(|until| Instant::now() >= until) {
            self.stop_until = None;
            match self.shutdown.phase {
                Phase::Soft => self.on_cause(Cause::SoftTimeout),
                Phase::Cold => self.shutdown.phase = Phase::Hard,
                Phase::Running | Phase::Warm | Phase::Hard => {}
            }
        }
    }

    /// How many deliveries may be unsettled now, 0 for any number; none: nothing is to be fetched.
    pub(super) fn wanted_prefetch(&self) -> Option<u32> {
        let limited = self.limited.min(MOST_LIMITED);
        if self.config.disable_prefetch && self.link.broker().capabilities().parks {
            // What runs, what waits for its time, and what could start now.
            let unsettled = self.jobs.active().filter(|(_, job)| !job.acknowledged).count();
            let unsettled = unsettled + self.desk.unsettled();
            // Under autoscale there are more slots as soon as there are tasks for them.
            let more = self
                .autoscaler
                .as_ref()
                .map_or(0, |scaler| scaler.max().saturating_sub(self.pool.capacity()));
            // Nobody knows what kind comes next: it must be able to start, whichever it is.
            let idle =
                (self.pool.idle() + more).saturating_sub(self.ready.len(Lane::Slot) + self.desk.claims());
            let idle = match self.pool.loop_slots() {
                0 => idle,
                _ => idle.min(self.pool.idle_loops().saturating_sub(self.ready.len(Lane::Loop))),
            };
            let waiting = self.etas.min(self.config.eta_task_limit.unwrap_or(u32::MAX));
            let claimed = self.ready.len(Lane::Slot) + self.ready.len(Lane::Loop) + self.desk.claims();
            let started = u32::try_from(unsettled + claimed + idle).unwrap_or(u32::MAX);
            return (idle > 0).then(|| started.saturating_add(waiting).saturating_add(limited));
        }
        if self.prefetch == 0 {
            return Some(0);
        }
        let raised = self.prefetch.saturating_add(self.etas);
        let raised = match self.config.eta_task_limit {
            Some(limit) => raised.min(limit.max(self.prefetch)),
            None => raised,
        };
        Some(raised.saturating_add(limited).saturating_add(self.loop_window))
    }

    /// How many deliveries event loops may hold: what the multiplier says of every slot.
    fn most_on_loops(&self) -> u32 {
        let slots = u32::try_from(self.pool.loop_slots()).unwrap_or(u32::MAX);
        self.config.prefetch_multiplier.saturating_mul(slots)
    }

    /// How many messages for processes may be fetched on the way to one for a loop, while loops run any. With a multiplier
    /// of 1, which asks for fairness between workers, no more than there are processes.
    fn loop_depth(&self) -> u32 {
        self.prefetch
            .saturating_add(self.config.prefetch_multiplier.saturating_sub(1).saturating_mul(ready::STEP))
    }

    fn tell_prefetch(&mut self) {
        let jobs = self.jobs.on_loops();
        let held = self.ready.len(Lane::Loop) + jobs.unsettled;
        let (most, depth) = (self.most_on_loops(), self.loop_depth());
        self.loop_window = ready::window(self.loop_window, held, jobs.running, most, depth);
        let wanted = self.wanted_prefetch();
        if wanted == self.told_prefetch || self.shutdown.phase > Phase::Running {
            return;
        }
        match wanted {
            Some(count) => {
                self.link.send(Command::Prefetch(count));
                if self.told_prefetch.is_none() {
                    self.link.send(Command::Resume);
                }
            }
            None => self.link.send(Command::Pause),
        }
        self.told_prefetch = wanted;
    }

    /// Gives ready requests to idle slots.
    fn pump(&mut self) {
        self.pump_calls();
        for lane in Lane::ALL {
            self.pump_lane(lane);
        }
        self.tell_prefetch();
    }

    fn has_room(&self, lane: Lane) -> bool {
        match lane {
            Lane::Slot => self.pool.idle() > self.desk.claims(),
            Lane::Loop => self.pool.idle_loops() > 0,
        }
    }

    fn pump_lane(&mut self, lane: Lane) {
        let tells = self.tells_tasks();
        while self.has_room(lane) && self.unwritten < MOST_UNWRITTEN {
            let Some(request) = self.ready.pop(lane) else { break };
            if !self.link.holds(request.handle.tag()) {
                // The broker took it back while it waited here; it will come again.
                self.forget(&request);
                request.handle.abandon();
                continue;
            }
            let Some(request) = self.unless_revoked(request) else { continue };
            if let Some(ticket) = request.ticket {
                self.execute(request, ticket);
                continue;
            }
            let id = self.jobs.next_id();
            let submitted = match lane {
                Lane::Slot => self.pool.submit(request.job(id, tells)),
                Lane::Loop => self.pool.submit_to_loop(request.job(id, tells)),
            };
            match submitted {
                Ok((_, pid)) => {
                    let limits = if request.is_untranslated() {
                        (None, None)
                    } else {
                        let worker = (self.config.time_limit, self.config.soft_time_limit);
                        self.pool.limits(request.limits(worker))
                    };
                    if !request.is_untranslated() {
                        self.count_start(&request);
                    }
                    let job = Running {
                        request,
                        pid,
                        started: clock::now(),
                        accepted: false,
                        acknowledged: false,
                        killed: None,
                        writes: 0,
                        publishes: 0,
                        held: Vec::new(),
                        reporting: false,
                        ended: None,
                        over: false,
                        outcome: None,
                    };
                    let now = self.uptime();
                    self.jobs.start(id, job, limits, now);
                }
                Err(_) => {
                    self.ready.push_front(request);
                    break;
                }
            }
        }
    }
}
