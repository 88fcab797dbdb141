//! The loop: deliveries in, jobs to the pool, outcomes and settlements back. State has this one owner; everything
//! else sends it messages. It decides through the pure modules beside it and never waits for anything but events.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Exit;
use super::asking::Asked;
use super::dispatch::{Refusal, Rules, Verdict, dispatch};
use super::hooks::{Hooks, Incident, LogRecord, Notice, Report, Unstarted};
use super::hosting::Desk;
use super::jobs::{Jobs, Running};
use super::link::{Link, LinkEvent};
use super::request::Request;
use super::results::{Write, Written};
use super::revoked::{Bounds, Revoked, RevokedTasks};
use super::schedule::{Due, RateLimits};
use super::shutdown::{Cause, Phase, Said, Shutdown};
use crate::broker::reconnect::Why;
use crate::broker::{self, Command, Delivery, Handle, Settlement, Tag};
use crate::clock;
use crate::cluster::clock::LamportClock;
use crate::config::{Config, Hosting};
use crate::error::{BrokerError, Error};
use crate::pool::{self, JobId, Pool};
use crate::protocol::{DeliveryInfo, Message, TaskHeaders, repr};

/// An `eta` further away than this is parked in the broker, where the broker can: nearer ones are not worth two commands.
const PARK_BEYOND: f64 = 10.0;
/// Parked requests of which remote control can show more than nothing; each costs its message.
const SHOWN: usize = 10_000;
/// Requests that may wait for their turn under a rate limit without being counted as prefetched, so that others behind
/// them are fetched. Bounded: what waits here cannot run on another worker that has turns to give.
const MOST_LIMITED: u32 = 256;
/// Results that may wait for the backend before no further task is started.
const MOST_UNWRITTEN: usize = 10_000;
/// Longest sleep of the timer; the wall clock may step.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// How long killed children may take at a cold stop, with their account; longer than the pool waits before it kills.
const COLD_PATIENCE: Duration = Duration::from_secs(8);

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
    /// No request: the next heartbeat.
    Heartbeat,
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
    pub(super) answer: Option<Settlement>,
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
    pub(super) ready: VecDeque<Request>,
    pub(super) waiting: Due<Waiting>,
    /// Parked requests that were asked for: they were received before.
    returning: HashSet<Tag>,
    pub(super) rate_limits: RateLimits,
    pub(super) jobs: Jobs,
    pub(super) totals: HashMap<String, u64>,
    pub(super) shutdown: Shutdown,
    pub(super) prefetch: u32,
    pub(super) clock: LamportClock,
    pub(super) revoked: RevokedTasks,
    /// Rate limits that were changed, as they were given.
    pub(super) rate_texts: HashMap<String, Option<String>>,
    /// Revoked tasks that the app is to store as such before the reply is sent.
    pub(super) storing: Vec<Unstarted>,
    /// Results that the backend does not have yet.
    pub(super) unwritten: usize,
    pub(super) reports: JoinSet<Reported>,
    pub(super) asking: JoinSet<Asked>,
    pub(super) receiving: FuturesOrdered<BoxFuture<'static, Received>>,
    /// Messages that the app's own objects decide about.
    pub(super) desk: Desk,
    etas: u32,
    pub(super) limited: u32,
    /// The last that the broker was told; none: to fetch nothing.
    told_prefetch: Option<u32>,
    started: Instant,
    stop_until: Option<Instant>,
    pub(super) slots_up: usize,
    connected: bool,
    ready_told: bool,
    pub(super) broken: Option<String>,
}

impl Consumer {
    pub(super) fn new(
        config: Config,
        link: Link,
        pool: Box<dyn Pool>,
        hooks: Arc<dyn Hooks>,
        writes: Option<mpsc::UnboundedSender<Write>>,
    ) -> Result<Self, Error> {
        let rules = Rules::of(&config)?;
        let bounds = Bounds::from_env(|name| std::env::var(name).ok()).map_err(Error::Config)?;
        let prefetch = config.prefetch();
        let mut revoked = RevokedTasks::new(bounds);
        config.revoked.iter().for_each(|id| revoked.insert(id, Instant::now()));
        let clock = LamportClock::at(config.clock);
        let desk = Desk::new(hooks.as_ref());
        let mut consumer = Self {
            config,
            rules,
            link,
            pool,
            hooks,
            writes,
            ready: VecDeque::new(),
            waiting: Due::default(),
            returning: HashSet::new(),
            rate_limits: RateLimits::default(),
            jobs: Jobs::default(),
            totals: HashMap::new(),
            shutdown: Shutdown::default(),
            prefetch,
            clock,
            revoked,
            rate_texts: HashMap::new(),
            storing: Vec::new(),
            unwritten: 0,
            reports: JoinSet::new(),
            asking: JoinSet::new(),
            receiving: FuturesOrdered::new(),
            desk,
            etas: 0,
            limited: 0,
            told_prefetch: Some(prefetch),
            started: Instant::now(),
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
            self.pump();
            self.link.flush();
            if self.is_over() {
                break;
            }
            let until = self.next_due();
            tokio::select! {
                event = self.link.next() => self.on_link(event),
                event = inbox.pool.recv() => self.on_pool_events(event, &mut inbox.pool),
                Some(written) = inbox.written.recv() => self.on_written(written),
                Some(reported) = self.reports.join_next() => self.on_reported(reported),
                Some(received) = self.receiving.next() => self.on_received(received),
                Some(order) = self.desk.orders.recv() => self.on_order(order),
                Some(done) = self.desk.asking.join_next() => self.on_done(done),
                Some(asked) = self.asking.join_next() => self.on_asked(asked),
                Some(cause) = inbox.causes.recv() => self.on_cause(cause),
                () = tokio::time::sleep_until(until) => self.on_due(),
            }
        }
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
        if let Some(at) = self.jobs.next_limit() {
            sleep = sleep.min(Duration::try_from_secs_f64(at - self.uptime()).unwrap_or_default());
        }
        if let Some(at) = self.desk.next_limit() {
            sleep = sleep.min(Duration::try_from_secs_f64(at - self.uptime()).unwrap_or_default());
        }
        let until = Instant::now() + sleep;
        self.stop_until.map_or(until, |stop| until.min(stop))
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
                self.tell_ready();
            }
            LinkEvent::Failed { address, error, wait, attempt, most } => {
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
            LinkEvent::Broker(broker::Event::Remembered(ids)) => self.recall(ids),
            LinkEvent::Broker(broker::Event::Forgotten(tags)) => {
                for tag in &tags {
                    self.returning.remove(tag);
                }
                tracing::warn!(
                    target: "celery.worker",
                    count = tags.len(),
                    "The broker gave messages of ours to somebody else, because this worker was silent for too long; they may run twice."
                );
            }
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
    fn drop_unstarted(&mut self) {
        let mut unstarted: Vec<Request> = self.ready.drain(..).collect();
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

    pub(super) fn on_delivery(&mut self, delivery: Delivery) {
        if self.shutdown.phase > Phase::Running {
            self.link.settle(delivery.handle.settle(Settlement::GiveBack));
            return;
        }
        let returns = self.returning.remove(&delivery.handle.tag());
        match dispatch(delivery, &self.rules) {
            Verdict::Refuse(refusal) => self.refuse(*refusal),
            Verdict::Request(request) if request.is_untranslated() => {
                if returns {
                    self.returning.insert(request.handle.tag());
                }
                self.ready.push_back(*request);
            }
            Verdict::Request(request) if request.policy.hosting == Hosting::Strategy => self.host(*request),
            Verdict::Request(request) if returns => self.admit(*request),
            Verdict::Request(request) => self.on_request(*request),
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        let Refusal { delivery, incident, settlement } = refusal;
        let report = Report { what: incident, message: delivery.message, info: delivery.info, pid: None };
        self.report(report, None, Some((delivery.handle, settlement)));
    }

    fn on_request(&mut self, request: Request) {
        if self.config.log_info {
            self.hooks.log(LogRecord {
                logger: "celery.worker.strategy",
                level: 20,
                message: format!("Task {} received", request.human()),
                data: Some(json!({
                    "id": request.headers.id,
                    "name": request.headers.display_name(),
                    "args": request.headers.argsrepr.as_deref().unwrap_or(""),
                    "kwargs": request.headers.kwargsrepr.as_deref().unwrap_or(""),
                    "eta": request.headers.eta,
                })),
            });
        }
        // As in 5.7: what is revoked by a stamp is found out when its turn comes, after `task_received`.
        let now = request.expires.is_some() || self.revoked.contains(&request.headers.id);
        let request = if now { self.unless_revoked(request) } else { Some(request) };
        let Some(request) = request else { return };
        if request.policy.hosting == Hosting::Request {
            self.receive_hosted(request);
        } else if self.hooks.wants_received() || !self.receiving.is_empty() {
            let hooks = self.hooks.clone();
            self.receiving.push_back(Box::pin(async move {
                hooks.received(&request.message, &request.info).await;
                Received::Task(Box::new(request))
            }));
        } else {
            self.admit(request);
        }
    }

    fn on_received(&mut self, received: Received) {
        match received {
            Received::Task(request) => self.admit(*request),
            Received::Refused(request, settlement) => self.link.settle(request.handle.settle(settlement)),
            Received::Command(message) => self.obey(&message),
        }
    }

    /// Gives the request back unless it is revoked or expired; then it is reported and gone.
    fn unless_revoked(&mut self, request: Request) -> Option<Request> {
        let expired = request.expires.is_some_and(|expires| clock::now() > expires);
        let revoked = self.revoked.find(&request.headers);
        if !expired && revoked.is_none() {
            return Some(request);
        }
        let by_header = match revoked {
            Some(Revoked::Stamp { name, value }) => {
                let header = json!({name: value}).to_string();
                let header = repr::saferepr(&header, None, 3).unwrap_or(header);
                format!(" (revoked by header: {header})")
            }
            Some(Revoked::Id) | None => String::new(),
        };
        if expired {
            let id = &request.headers.id;
            self.revoked.insert(id, Instant::now());
            self.hooks.notice(Notice::Revoked(vec![id.clone()]));
        }
        tracing::info!(target: "celery.worker.request", "Discarding revoked task: {}{by_header}", request.human());
        if let Some(ticket) = request.ticket {
            self.discard(request, ticket, expired);
            return None;
        }
        let reason = if expired { "expired" } else { "revoked" };
        let what = Incident::Revoked { reason, terminated: false, signal: None, expired };
        let report = Report { what, message: request.message, info: request.info, pid: None };
        self.report(report, None, Some((request.handle, Settlement::Ack)));
        None
    }

    /// A request that may run: at its time, at its turn, or now.
    fn admit(&mut self, request: Request) {
        if self.shutdown.phase > Phase::Running {
            self.link.settle(request.handle.settle(Settlement::GiveBack));
            return;
        }
        let now = clock::now();
        match request.eta {
            Some(eta) if eta > now => {
                // With a limit on them they are counted, as in Celery; parked ones are not. A parked request is
                // forgotten, and the object that the app has made of it would be made twice.
                let parks = self.link.broker().capabilities().parks
                    && self.config.eta_task_limit.is_none()
                    && request.ticket.is_none();
                if parks && eta > now + PARK_BEYOND && self.link.is_up() {
                    let Request { headers, message, info, handle, .. } = request;
                    let tag = handle.abandon();
                    self.link.send(Command::Park { tag, due: eta });
                    let shown =
                        (self.waiting.len() < SHOWN).then(|| Box::new(Shown { headers, message, info }));
                    self.waiting.push(eta, Waiting::Parked { tag, shown });
                } else {
                    self.etas += 1;
                    self.waiting.push(eta, Waiting::Eta(Box::new(request)));
                }
            }
            _ => self.take_turn(request, now),
        }
    }

    pub(super) fn take_turn(&mut self, request: Request, now: f64) {
        let rate = match self.rate_texts.is_empty() {
            true => request.policy.rate_limit,
            // It may have been changed since the request came.
            false => self.rules.tasks.get(&request.headers.task).and_then(|policy| policy.rate_limit),
        };
        let turn = match rate {
            Some(rate) if rate > 0.0 && self.config.rate_limits => {
                self.rate_limits.turn(&request.headers.task, rate, now)
            }
            _ => now,
        };
        if turn > now {
            self.limited += 1;
            self.waiting.push(turn, Waiting::Limited(Box::new(request)));
        } else {
            self.ready.push_back(request);
        }
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
                Waiting::Heartbeat => self.beat(),
            }
        }
        if !parked.is_empty() {
            self.returning.extend(&parked);
            self.link.send(Command::Unpark(parked));
        }
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
            let started = u32::try_from(unsettled + self.pool.idle()).unwrap_or(u32::MAX);
            let waiting = self.etas.min(self.config.eta_task_limit.unwrap_or(u32::MAX));
            let free = self.pool.idle() > self.ready.len() + self.desk.claims();
            return free.then(|| started.saturating_add(waiting).saturating_add(limited));
        }
        if self.prefetch == 0 {
            return Some(0);
        }
        let raised = self.prefetch.saturating_add(self.etas);
        let raised = match self.config.eta_task_limit {
            Some(limit) => raised.min(limit.max(self.prefetch)),
            None => raised,
        };
        Some(raised.saturating_add(limited))
    }

    fn tell_prefetch(&mut self) {
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
        while self.pool.idle() > self.desk.claims() && self.unwritten < MOST_UNWRITTEN {
            let Some(request) = self.ready.pop_front() else { break };
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
            match self.pool.submit(request.job(id)) {
                Ok((_, pid)) => {
                    let limits = if self.pool.interrupts() && !request.is_untranslated() {
                        request.limits((self.config.time_limit, self.config.soft_time_limit))
                    } else {
                        (None, None)
                    };
                    if !request.is_untranslated() {
                        *self.totals.entry(request.headers.task.clone()).or_default() += 1;
                    }
                    let job = Running {
                        request,
                        pid,
                        started: clock::now(),
                        accepted: false,
                        acknowledged: false,
                        killed: None,
                        writes: 0,
                        reporting: false,
                        ended: None,
                        over: false,
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
        self.tell_prefetch();
    }

    // --- life -----------------------------------------------------------------------------------------

    pub(super) fn tell_ready(&mut self) {
        if self.connected && self.slots_up > 0 && !self.ready_told {
            self.ready_told = true;
            self.hooks.notice(Notice::Ready);
            if self.config.heartbeat.is_some() {
                self.beat();
            }
        }
    }

    fn beat(&mut self) {
        let Some(interval) = self.config.heartbeat else { return };
        self.waiting.push(clock::now() + interval.max(0.1), Waiting::Heartbeat);
        self.hooks.notice(Notice::Heartbeat);
    }

    pub(super) fn on_cause(&mut self, cause: Cause) {
        let before = self.shutdown.phase;
        let busy = self.jobs.active().next().is_some() || self.desk.running() > 0;
        let Said { lines, shutting_down } = self.shutdown.step(cause, busy, &self.config.shutdown);
        for line in lines {
            self.hooks.notice(Notice::Say(line.to_owned()));
        }
        if let Some((signal, how, exit_code)) = shutting_down {
            self.hooks.notice(Notice::ShuttingDown { signal: signal.to_owned(), how, exit_code });
        }
        let phase = self.shutdown.phase;
        if before == Phase::Running && phase > Phase::Running {
            self.give_back();
        }
        if phase == Phase::Soft && before < Phase::Soft {
            let timeout = self.config.shutdown.soft_timeout;
            tracing::warn!(target: "celery.worker", "Initiating Soft Shutdown, terminating in {timeout} seconds");
            self.stop_until = Some(Instant::now() + Duration::try_from_secs_f64(timeout).unwrap_or_default());
        }
        if phase == Phase::Cold && before < Phase::Cold {
            let running: Vec<JobId> = self.jobs.active().map(|(id, _)| id).collect();
            self.kill(&running);
            self.kill_calls();
            self.stop_until = Some(Instant::now() + COLD_PATIENCE);
        }
    }

    /// Stops fetching and puts everything that has not started back where it came from, in order.
    fn give_back(&mut self) {
        self.link.send(Command::Pause);
        let mut unstarted: Vec<Request> = self.ready.drain(..).collect();
        for waiting in self.waiting.drain() {
            match waiting {
                Waiting::Eta(request) | Waiting::Limited(request) => unstarted.push(*request),
                Waiting::Parked { .. } | Waiting::Heartbeat => {}
            }
        }
        (self.etas, self.limited) = (0, 0);
        for request in unstarted {
            self.link.settle(request.handle.settle(Settlement::GiveBack));
        }
        self.link.flush();
    }

    fn is_over(&self) -> bool {
        match self.shutdown.phase {
            Phase::Running => false,
            Phase::Hard => true,
            Phase::Warm | Phase::Soft | Phase::Cold => {
                self.jobs.is_empty()
                    && self.reports.is_empty()
                    && self.receiving.is_empty()
                    && self.desk.is_idle()
            }
        }
    }

    /// Lets go of everything when the worker leaves without waiting: the broker redelivers it.
    pub(super) fn abandon(&mut self) {
        self.drop_unstarted();
        self.desk.abandon();
        for id in self.jobs.all() {
            if let Some(job) = self.jobs.remove(id) {
                job.request.handle.abandon();
            }
        }
    }
}
