//! Tasks whose `Request` or `Strategy` class is the app's own: Python objects in the parent process decide about their
//! messages, and post calls to the pool. Here are the books of both; nothing here is touched for other tasks.
//!
//! A message that Python decides about has a *ticket*. With a custom `Request` the worker schedules it like any other
//! (eta, rate limit, revoked, its turn) and asks the object to execute itself when a slot is idle; with a custom
//! `Strategy` the message is handed over as it comes. What these objects ask for comes back as [`Order`]s. A call is
//! pickled by Python and unpickled in a child: bytes here.

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::consumer::{Consumer, Received};
use super::hooks::Hooks;
use super::inside::Inside;
use super::jobs::Limit;
use super::request::Request;
use super::schedule::Due;
use super::shutdown::{Cause, Phase};
use crate::broker::topology::Queue;
use crate::broker::{Command, Settlement};
use crate::clock;
use crate::config::Hosting;
use crate::pool::{Hints, Interrupt, Job, JobId, Outcome, Work};
use crate::protocol::{DeliveryInfo, Json, Message};

/// Names a message that Python decides about; never reused.
pub type Ticket = u64;

/// What the app's objects ask for.
#[derive(Debug)]
pub enum Order {
    /// Tells the broker of a message. The first counts.
    Settle {
        /// Which.
        ticket: Ticket,
        /// What to tell.
        settlement: Settlement,
    },
    /// Runs a call in the pool.
    Call(Call),
    /// Calls an election.
    Elect {
        /// Names it.
        id: String,
        /// What kind of thing is to be done.
        topic: String,
        /// What is to be done.
        action: Value,
    },
    /// Sends an event.
    Event {
        /// Its type.
        kind: String,
        /// Its fields.
        fields: Map<String, Value>,
    },
    /// Kills the child that runs a call.
    Terminate {
        /// Which call.
        call: u64,
        /// With this signal first.
        signal: i32,
    },
    /// Consumes a queue too.
    Consume(Box<Queue>),
    /// Stops consuming the queue of this name.
    Cancel(String),
    /// Ends the worker warmly.
    Stop {
        /// The exit status.
        code: i32,
    },
    /// Asks something of the worker that concerns none of its requests.
    Inside(Inside),
}

/// A call for the pool.
#[derive(Clone, Debug)]
pub struct Call {
    /// Python's number for it.
    pub number: u64,
    /// The message whose request posted it, where there is one.
    pub ticket: Option<Ticket>,
    /// Function and arguments, pickled.
    pub body: Bytes,
    /// Seconds; else the worker's.
    pub soft_limit: Option<f64>,
    /// Seconds; else the worker's.
    pub hard_limit: Option<f64>,
}

/// What the app's objects are told.
#[derive(Debug, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Hosted {
    /// A message for a strategy.
    Deliver {
        /// Its ticket.
        ticket: Ticket,
        /// The message.
        #[serde(skip)]
        message: Message,
        /// Where it came from.
        #[serde(skip)]
        info: DeliveryInfo,
    },
    /// A message for which a request is to be made.
    Received {
        /// Its ticket.
        ticket: Ticket,
        /// The message.
        #[serde(skip)]
        message: Message,
        /// Where it came from.
        #[serde(skip)]
        info: DeliveryInfo,
    },
    /// The request is to put itself into the pool.
    Execute {
        /// Its ticket.
        ticket: Ticket,
    },
    /// The request was revoked or expired while it waited: it is to announce that, and to acknowledge.
    Revoked {
        /// Its ticket.
        ticket: Ticket,
        /// Expired, not revoked.
        expired: bool,
    },
    /// The request will not be executed here.
    Forget {
        /// Its ticket.
        ticket: Ticket,
    },
    /// Remote control terminates the request.
    Terminate {
        /// Its ticket.
        ticket: Ticket,
        /// The signal.
        signal: i32,
    },
    /// The worker killed what ran for the request, for a cold stop.
    Cancelled {
        /// Its ticket.
        ticket: Ticket,
    },
    /// A child starts the call.
    Accepted {
        /// Which.
        call: u64,
        /// The child.
        pid: u32,
    },
    /// The call passed a limit.
    TimedOut {
        /// Which.
        call: u64,
        /// Whether it was the soft one; after the hard one the call is over.
        soft: bool,
        /// Seconds.
        limit: f64,
    },
    /// The call is over.
    Answered {
        /// Which.
        call: u64,
        /// What it answered, pickled.
        #[serde(skip)]
        value: Bytes,
    },
    /// The call is over: its child died.
    Lost {
        /// Which.
        call: u64,
        /// As billiard words it.
        status: String,
    },
    /// The call is over: its child was killed as the app asked.
    Terminated {
        /// Which.
        call: u64,
        /// The signal.
        signal: i32,
    },
}

/// A message that Python decides about.
struct Held {
    request: Request,
    settled: bool,
    /// Calls of its request that wait or run.
    calls: u32,
}

/// A call in the pool.
struct Running {
    call: Call,
    pid: u32,
    started: f64,
    accepted: bool,
    /// The pool's answer; the end of the job follows it.
    answer: Option<Bytes>,
    killed: Option<Killed>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    /// By the app, with this signal.
    Terminated(i32),
    /// By the worker.
    Cancelled,
}

/// A request of the books, for remote control.
pub(super) struct Shown<'a> {
    pub(super) request: &'a Request,
    pub(super) settled: bool,
    /// When and where it runs.
    pub(super) running: Option<(f64, u32)>,
}

/// The books.
pub(super) struct Desk {
    pub(super) orders: mpsc::UnboundedReceiver<Order>,
    /// What Python was asked and has not done yet; a finished execution says so.
    pub(super) asking: JoinSet<Done>,
    held: HashMap<Ticket, Held>,
    /// Calls that wait for a slot, and whether a child died before it began them.
    ready: VecDeque<(Call, bool)>,
    calls: HashMap<JobId, Running>,
    bounced: HashSet<JobId>,
    limits: Due<(JobId, Limit)>,
    /// Requests that are about to put themselves into the pool.
    executing: usize,
    last: Ticket,
}

/// What Python has finished.
pub(super) enum Done {
    Execution,
    Other,
}

impl Desk {
    pub(super) fn new(hooks: &dyn Hooks) -> Self {
        Self {
            orders: hooks.orders(),
            asking: JoinSet::new(),
            held: HashMap::new(),
            ready: VecDeque::new(),
            calls: HashMap::new(),
            bounced: HashSet::new(),
            limits: Due::default(),
            executing: 0,
            last: 0,
        }
    }

    /// Idle slots that are spoken for.
    pub(super) fn claims(&self) -> usize {
        self.executing + self.ready.len()
    }

    /// Calls that run.
    pub(super) fn running(&self) -> usize {
        self.calls.len()
    }

    /// Whether a request of a custom class with this id runs.
    pub(super) fn runs(&self, id: &str) -> bool {
        self.held.values().any(|held| held.calls > 0 && held.request.headers.id == id)
    }

    /// Messages of which the broker has not been told.
    pub(super) fn unsettled(&self) -> usize {
        self.held.values().filter(|held| !held.settled).count()
    }

    /// Whether nothing runs and nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.calls.is_empty() && self.asking.is_empty() && self.orders.is_empty()
    }

    pub(super) fn next_limit(&self) -> Option<f64> {
        self.limits.next()
    }

    /// The requests of custom classes. What a strategy holds it shows itself, or not, as in Celery.
    pub(super) fn shown(&self) -> impl Iterator<Item = Shown<'_>> {
        let running: HashMap<Ticket, (f64, u32)> = self
            .calls
            .values()
            .filter_map(|running| Some((running.call.ticket?, (running.started, running.pid))))
            .collect();
        self.held.iter().filter(|(_, held)| held.request.policy.hosting == Hosting::Request).map(
            move |(ticket, held)| Shown {
                request: &held.request,
                settled: held.settled,
                running: running.get(ticket).copied(),
            },
        )
    }

    fn number(&mut self) -> Ticket {
        self.last += 1;
        self.last
    }

    /// Lets go of a message that was settled and for which nothing runs any more.
    fn release(&mut self, ticket: Ticket) {
        if self.held.get(&ticket).is_some_and(|held| held.settled && held.calls == 0)
            && let Some(held) = self.held.remove(&ticket)
        {
            held.request.handle.abandon();
        }
    }

    /// Leaves every message to the broker.
    pub(super) fn abandon(&mut self) {
        for (_, held) in self.held.drain() {
            held.request.handle.abandon();
        }
    }
}

impl Consumer {
    fn tell(&mut self, event: Hosted) {
        let done = if matches!(event, Hosted::Execute { .. }) { Done::Execution } else { Done::Other };
        let answer = self.hooks.host(event);
        self.desk.asking.spawn(async move {
            answer.await;
            done
        });
    }

    pub(super) fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        // One that panicked cannot say what it was: an execution counted too long would keep a slot idle for ever.
        if !matches!(done, Ok(Done::Other)) {
            self.desk.executing = self.desk.executing.saturating_sub(1);
        }
    }

    /// Hands a message to the task's strategy.
    pub(super) fn host(&mut self, mut request: Request) {
        let ticket = self.desk.number();
        request.ticket = Some(ticket);
        let (message, info) = (request.message.clone(), request.info.clone());
        self.desk.held.insert(ticket, Held { request, settled: false, calls: 0 });
        self.tell(Hosted::Deliver { ticket, message, info });
    }

    /// Has a request object made; the request is admitted when there is one.
    pub(super) fn receive_hosted(&mut self, mut request: Request) {
        let ticket = self.desk.number();
        request.ticket = Some(ticket);
        let (message, info) = (request.message.clone(), request.info.clone());
        let made = self.hooks.host(Hosted::Received { ticket, message, info });
        self.receiving.push_back(Box::pin(async move {
            match made.await {
                Some(settlement) => Received::Refused(Box::new(request), settlement),
                None => Received::Task(Box::new(request)),
            }
        }));
    }

    /// Has the request put itself into the pool.
    pub(super) fn execute(&mut self, request: Request, ticket: Ticket) {
        self.count_start(&request);
        self.desk.held.insert(ticket, Held { request, settled: false, calls: 0 });
        self.desk.executing += 1;
        self.tell(Hosted::Execute { ticket });
    }

    /// Has the request announce that it is revoked.
    pub(super) fn discard(&mut self, request: Request, ticket: Ticket, expired: bool) {
        self.desk.held.insert(ticket, Held { request, settled: false, calls: 0 });
        self.tell(Hosted::Revoked { ticket, expired });
    }

    /// The request will not be executed.
    pub(super) fn forget(&mut self, request: &Request) {
        if let Some(ticket) = request.ticket {
            self.tell(Hosted::Forget { ticket });
        }
    }

    pub(super) fn on_order(&mut self, order: Order) {
        match order {
            Order::Inside(inside) => self.on_inside(inside),
            Order::Settle { ticket, settlement } => {
                let Some(held) = self.desk.held.get_mut(&ticket) else { return };
                if !held.settled {
                    held.settled = true;
                    let tag = held.request.handle.tag();
                    self.link.settle((tag, settlement));
                }
                self.desk.release(ticket);
            }
            Order::Elect { id, topic, action } => self.call_election(&id, &topic, action),
            Order::Event { kind, fields } => self.tell_event(&kind, &fields),
            // As a pool that is closed: what has not started is given back.
            Order::Call(_) if self.shutdown.phase > Phase::Running => {}
            Order::Call(call) => {
                if let Some(held) = call.ticket.and_then(|ticket| self.desk.held.get_mut(&ticket)) {
                    held.calls += 1;
                }
                self.desk.ready.push_back((call, false));
            }
            Order::Terminate { call, signal } => {
                let running = self.desk.calls.iter_mut().find(|(_, running)| running.call.number == call);
                if let Some((id, running)) = running
                    && running.killed.is_none()
                    && self.pool.interrupts()
                {
                    running.killed = Some(Killed::Terminated(signal));
                    self.pool.interrupt(*id, Interrupt::Terminate(signal));
                }
            }
            Order::Consume(queue) => self.consume_for_app(*queue),
            Order::Cancel(name) => self.link.send(Command::Cancel(name)),
            Order::Stop { code } => self.on_cause(Cause::App { code }),
        }
    }

    /// Gives waiting calls to idle slots; at a stop gives back what has not begun.
    pub(super) fn pump_calls(&mut self) {
        if self.shutdown.phase > Phase::Running {
            self.give_back_hosted();
        }
        while self.pool.idle() > 0 {
            let Some((call, bounced)) = self.desk.ready.pop_front() else { break };
            let id = self.jobs.next_id();
            let job = Job {
                id,
                task: String::new(),
                task_id: String::new(),
                headers: Json::empty(),
                properties: Json::empty(),
                info: DeliveryInfo::default(),
                body: call.body.clone(),
                content_type: String::new(),
                content_encoding: String::new(),
                acks_early: true,
                work: Work::Call,
                hints: Hints::default(),
            };
            let Ok((_, pid)) = self.pool.submit(job) else {
                self.desk.ready.push_front((call, bounced));
                break;
            };
            let now = self.uptime();
            let pick = |choices: [Option<f64>; 2]| choices.into_iter().flatten().find(|limit| *limit > 0.0);
            let (hard, soft) = self.pool.limits((
                pick([call.hard_limit, self.config.time_limit]),
                pick([call.soft_limit, self.config.soft_time_limit]),
            ));
            if let Some(soft) = soft {
                self.desk.limits.push(now + soft, (id, Limit::Soft(soft)));
            }
            if let Some(hard) = hard {
                self.desk.limits.push(now + hard, (id, Limit::Hard(hard)));
            }
            if bounced {
                self.desk.bounced.insert(id);
            }
            let started = clock::now();
            self.desk
                .calls
                .insert(id, Running { call, pid, started, accepted: false, answer: None, killed: None });
        }
    }

    pub(super) fn on_call_limits(&mut self) {
        let now = self.uptime();
        while let Some((id, limit)) = self.desk.limits.pop(now) {
            let Some(running) = self.desk.calls.get(&id) else { continue };
            match limit {
                Limit::Soft(seconds) => {
                    let call = running.call.number;
                    self.tell(Hosted::TimedOut { call, soft: true, limit: seconds });
                    self.pool.interrupt(id, Interrupt::SoftLimit);
                }
                Limit::Hard(seconds) => self.pool.interrupt(id, Interrupt::HardLimit(seconds)),
            }
        }
        let calls = &self.desk.calls;
        self.desk.limits.prune(calls.len(), |(id, _)| calls.contains_key(id));
    }

    /// Whether the job is a call; its request is told.
    pub(super) fn on_call_accepted(&mut self, id: JobId) -> bool {
        let Some(running) = self.desk.calls.get_mut(&id) else { return false };
        running.accepted = true;
        let event = Hosted::Accepted { call: running.call.number, pid: running.pid };
        self.tell(event);
        true
    }

    pub(super) fn on_answered(&mut self, id: JobId, value: Bytes) {
        if let Some(running) = self.desk.calls.get_mut(&id) {
            running.answer = Some(value);
        }
    }

    /// Gives the outcome back unless the job is a call.
    pub(super) fn on_call_ended(&mut self, id: JobId, outcome: Outcome) -> Option<Outcome> {
        let Some(Running { call, accepted, answer, killed, .. }) = self.desk.calls.remove(&id) else {
            return Some(outcome);
        };
        let bounced = self.desk.bounced.remove(&id);
        let number = call.number;
        if matches!(outcome, Outcome::WorkerLost { .. }) && !accepted && !bounced && killed.is_none() {
            // As a task that its child never began.
            self.desk.ready.push_front((call, true));
            return None;
        }
        let event = match (outcome, answer, killed) {
            (_, _, Some(Killed::Cancelled)) => match call.ticket {
                Some(ticket) => Hosted::Cancelled { ticket },
                // As in Celery, nobody hears of it: what it was for goes back.
                None => return None,
            },
            (Outcome::TimedOut { limit }, ..) => Hosted::TimedOut { call: number, soft: false, limit },
            (Outcome::WorkerLost { .. } | Outcome::Terminated, _, Some(Killed::Terminated(signal))) => {
                Hosted::Terminated { call: number, signal }
            }
            // Also when its child left for it.
            (_, Some(value), _) => Hosted::Answered { call: number, value },
            (Outcome::WorkerLost { mut status }, ..) => {
                if status.starts_with("signal") {
                    status.push_str(&format!(" Job: {}", id.saturating_sub(1)));
                }
                Hosted::Lost { call: number, status }
            }
            (Outcome::Terminated, ..) => {
                Hosted::Lost { call: number, status: "signal 15 (SIGTERM)".to_owned() }
            }
            (Outcome::Undecodable { reason }, ..) => Hosted::Lost { call: number, status: reason },
            (_, None, _) => Hosted::Lost { call: number, status: "without an answer".to_owned() },
        };
        self.tell(event);
        if let Some(ticket) = call.ticket {
            if let Some(held) = self.desk.held.get_mut(&ticket) {
                held.calls = held.calls.saturating_sub(1);
            }
            self.desk.release(ticket);
        }
        None
    }

    /// Terminates the requests of custom classes with this id, through their own method.
    pub(super) fn terminate_hosted(&mut self, id: &str, signal: i32) {
        let tickets: Vec<Ticket> = self
            .desk
            .held
            .iter()
            .filter(|(_, held)| held.calls > 0 && held.request.headers.id == id)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in tickets {
            self.tell(Hosted::Terminate { ticket, signal });
        }
    }

    /// Kills the children that run calls, at a cold stop.
    pub(super) fn kill_calls(&mut self) {
        let signal = self.config.shutdown.terminate_signal();
        for (id, running) in &mut self.desk.calls {
            if running.killed.is_none() {
                running.killed = Some(Killed::Cancelled);
                self.pool.interrupt(*id, Interrupt::Terminate(signal));
            }
        }
    }

    /// The worker stops: calls that no child has are dropped, and messages for which nothing runs go back. Which
    /// messages a strategy's call is for only the strategy knows: they wait for its last.
    fn give_back_hosted(&mut self) {
        self.desk.ready.clear();
        if self.desk.held.is_empty() || !self.desk.asking.is_empty() || !self.desk.orders.is_empty() {
            return;
        }
        let busy: HashSet<Option<Ticket>> =
            self.desk.calls.values().map(|running| running.call.ticket).collect();
        let over: Vec<Ticket> = self
            .desk
            .held
            .iter()
            .filter(|(ticket, held)| match held.request.policy.hosting {
                Hosting::Strategy => !busy.contains(&None),
                Hosting::Native | Hosting::Request => !busy.contains(&Some(**ticket)),
            })
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in over {
            let Some(held) = self.desk.held.remove(&ticket) else { continue };
            if held.settled {
                held.request.handle.abandon();
            } else {
                self.link.settle(held.request.handle.settle(Settlement::GiveBack));
            }
        }
    }
}
