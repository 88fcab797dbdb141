//! `memory://`: queues of this process, for tests and native programs.
//!
//! Every name (`memory://tests` has the name `tests`) is one [`Hub`], made when it is first asked for and kept as
//! long as the process: messages outlive the workers, as they do on a server. What a worker holds stays in the hub,
//! under the worker's number, so that it comes back when the worker goes, whichever way it goes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::topology::{Queue, topic_matches};
use super::{
    Broker, COMMAND_CAPACITY, Capabilities, Command, Consume, Delivery, EVENT_CAPACITY, Event, Handle,
    Publication, Remembrance, Session, Settlement, Tag,
};
use crate::clock;
use crate::error::BrokerError;
use crate::protocol::{DeliveryInfo, Message};

/// All hubs, by name.
static HUBS: LazyLock<Mutex<HashMap<String, Arc<Hub>>>> = LazyLock::new(Mutex::default);

/// Numbers for workers and tags, unique in the process.
static COUNTER: AtomicU64 = AtomicU64::new(1);

/// Deliveries handed over in one event at most.
const BATCH: usize = 32;

/// One worker's access to the queues of a name. What it holds goes back to its queues when the last clone and the
/// last session are gone.
#[derive(Clone)]
pub struct MemoryBroker {
    worker: Arc<Worker>,
}

struct Worker {
    hub: Arc<Hub>,
    number: u64,
}

#[derive(Default)]
struct Hub {
    name: String,
    state: Mutex<State>,
    /// Counts changes; sessions look again after each.
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    queues: HashMap<String, VecDeque<Stored>>,
    exchanges: HashMap<String, Vec<Bound>>,
    held: HashMap<Tag, Held>,
    /// What is kept for the workers to come, with the time at which it is forgotten.
    remembered: Vec<(String, f64)>,
}

/// A message in a queue.
#[derive(Clone)]
struct Stored {
    message: Message,
    info: DeliveryInfo,
    /// Place among all messages ever put on a queue; what is given back returns to it.
    place: u64,
}

/// A message that a worker holds.
struct Held {
    stored: Stored,
    worker: u64,
    parked: bool,
}

/// A binding of a queue to an exchange.
#[derive(Clone, PartialEq)]
struct Bound {
    kind: String,
    key: String,
    queue: String,
}

impl MemoryBroker {
    /// A worker's access to the queues that `url` names.
    pub fn open(url: &str) -> Self {
        let name = url.split_once("://").map_or(url, |(_, name)| name).trim_end_matches('/').to_owned();
        let mut hubs = HUBS.lock().unwrap_or_else(PoisonError::into_inner);
        let hub = hubs.entry(name.clone()).or_insert_with(|| Arc::new(Hub { name, ..Hub::default() }));
        let worker = Worker { hub: Arc::clone(hub), number: next() };
        Self { worker: Arc::new(worker) }
    }

    /// Puts a message on a queue, as a producer does with the default exchange.
    pub fn publish(&self, queue: &str, message: Message) {
        self.worker.hub.publish(&Publication {
            exchange: String::new(),
            exchange_type: None,
            routing_key: queue.to_owned(),
            message,
            declare: None,
        });
    }

    /// How many messages wait in a queue.
    pub fn waiting(&self, queue: &str) -> usize {
        self.worker.hub.lock().queues.get(queue).map_or(0, VecDeque::len)
    }

    /// How many messages workers hold, parked ones included.
    pub fn unsettled(&self) -> usize {
        self.worker.hub.lock().held.len()
    }
}

fn next() -> u64 {
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

#[async_trait]
impl Broker for MemoryBroker {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            settles_across_sessions: true,
            parks: true,
            fanout: true,
            remembers: true,
            listens: false,
        }
    }

    fn address(&self) -> String {
        format!("memory://{}", self.worker.hub.name)
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        let (event_sender, events) = mpsc::channel(EVENT_CAPACITY);
        let (commands, command_receiver) = mpsc::channel(COMMAND_CAPACITY);
        let hub = &self.worker.hub;
        let changes = hub.changes.subscribe();
        hub.change(|state| state.take_back(self.worker.number, |tag| !consume.held.contains(&tag)));
        for queue in &consume.queues {
            hub.change(|state| state.declare(queue));
        }
        let mailbox = consume.control.as_ref().map(|control| {
            let exchange = format!("{}.pidbox", control.exchange);
            // Each session has its own: two workers of one name are each asked, as two connections are.
            let queue = format!("{}.{exchange}.{}", consume.node, next());
            let bound = Bound { kind: "fanout".to_owned(), key: String::new(), queue: queue.clone() };
            hub.change(|state| state.bind(&exchange, bound));
            Mailbox { hub: Arc::clone(hub), exchange, queue }
        });
        let remembered = hub.lock().recall();
        if !remembered.is_empty() {
            // The channel is new: there is room.
            let _ = event_sender.try_send(Event::Remembered(remembered));
        }
        let consumer = Consumer {
            worker: Arc::clone(&self.worker),
            queues: consume.queues.iter().map(|queue| queue.name.clone()).collect(),
            mailbox,
            prefetch: consume.prefetch as usize,
            paused: consume.paused,
            unparked: HashSet::new(),
            events: event_sender,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(consumer.run(command_receiver, changes));
        Ok(Session { events, commands, tasks })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.hub.change(|state| state.take_back(self.number, |_| true));
    }
}

/// A queue of remote control, gone with its session.
struct Mailbox {
    hub: Arc<Hub>,
    exchange: String,
    queue: String,
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.hub.change(|state| {
            state.queues.remove(&self.queue);
            if let Some(bindings) = state.exchanges.get_mut(&self.exchange) {
                bindings.retain(|bound| bound.queue != self.queue);
            }
        });
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let answer = change(&mut self.lock());
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        answer
    }

    fn publish(&self, publication: &Publication) {
        self.change(|state| {
            if let Some(queue) = &publication.declare {
                state.declare(queue);
            }
            for queue in state.route(&publication.exchange, &publication.routing_key) {
                let info = DeliveryInfo {
                    exchange: publication.exchange.clone(),
                    routing_key: publication.routing_key.clone(),
                    redelivered: false,
                    queue: queue.clone(),
                };
                let stored = Stored { message: publication.message.clone(), info, place: next() };
                state.queues.entry(queue).or_default().push_back(stored);
            }
        });
    }
}

impl State {
    fn remember(&mut self, remembrance: Remembrance) {
        let now = clock::now();
        self.remembered.retain(|(_, until)| *until > now);
        for (text, keep) in remembrance.entries {
            let before = self.remembered.iter().position(|(known, _)| *known == text);
            let before = before.map_or(now, |index| self.remembered.swap_remove(index).1);
            self.remembered.push((text, before.max(now + keep)));
        }
        self.remembered.sort_by(|(_, one), (_, other)| one.total_cmp(other));
        let surplus = self.remembered.len().saturating_sub(remembrance.most);
        if remembrance.most > 0 {
            self.remembered.drain(..surplus);
        }
    }

    fn recall(&self) -> Vec<String> {
        let now = clock::now();
        self.remembered.iter().filter(|(_, until)| *until > now).map(|(text, _)| text.clone()).collect()
    }

    fn bind(&mut self, exchange: &str, bound: Bound) {
        let bindings = self.exchanges.entry(exchange.to_owned()).or_default();
        if !bindings.contains(&bound) {
            bindings.push(bound);
        }
    }

    fn declare(&mut self, queue: &Queue) {
        self.queues.entry(queue.name.clone()).or_default();
        for binding in &queue.bindings {
            let bound = Bound {
                kind: binding.exchange.kind.clone(),
                key: binding.routing_key.clone(),
                queue: queue.name.clone(),
            };
            self.bind(&binding.exchange.name, bound);
        }
    }

    fn route(&self, exchange: &str, key: &str) -> Vec<String> {
        if exchange.is_empty() {
            return vec![key.to_owned()];
        }
        let mut queues: Vec<String> = Vec::new();
        for bound in self.exchanges.get(exchange).into_iter().flatten() {
            let matches = match bound.kind.as_str() {
                "fanout" => true,
                "topic" => topic_matches(&bound.key, key),
                _ => bound.key == key,
            };
            if matches && !queues.contains(&bound.queue) {
                queues.push(bound.queue.clone());
            }
        }
        queues
    }

    /// Puts a message back where it was among those that wait.
    fn put_back(&mut self, mut stored: Stored) {
        stored.info.redelivered = true;
        let queue = self.queues.entry(stored.info.queue.clone()).or_default();
        let index = queue.partition_point(|other| other.place < stored.place);
        queue.insert(index, stored);
    }

    fn take_back(&mut self, worker: u64, which: impl Fn(Tag) -> bool) {
        let tags: Vec<Tag> = self
            .held
            .iter()
            .filter(|(tag, held)| held.worker == worker && which(**tag))
            .map(|(tag, _)| *tag)
            .collect();
        for tag in tags {
            if let Some(held) = self.held.remove(&tag) {
                self.put_back(held.stored);
            }
        }
    }

    fn settle(&mut self, tag: Tag, worker: u64, settlement: Settlement) {
        if self.held.get(&tag).is_none_or(|held| held.worker != worker) {
            return;
        }
        let Some(Held { mut stored, .. }) = self.held.remove(&tag) else { return };
        match settlement {
            Settlement::Ack | Settlement::Reject => {}
            Settlement::Requeue => {
                stored.place = next();
                self.put_back(stored);
            }
            Settlement::GiveBack => self.put_back(stored),
        }
    }
}

/// A session's task.
struct Consumer {
    worker: Arc<Worker>,
    queues: VecDeque<String>,
    mailbox: Option<Mailbox>,
    prefetch: usize,
    paused: bool,
    /// Parked deliveries that were asked for.
    unparked: HashSet<Tag>,
    events: mpsc::Sender<Event>,
}

impl Consumer {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut changes: watch::Receiver<u64>) {
        loop {
            let events = self.events.clone();
            tokio::select! {
                // Commands first: what was told is done before more is fetched.
                biased;
                command = commands.recv() => {
                    let Some(command) = command else { return };
                    if let Command::Close(answer) = command {
                        self.worker.hub.change(|state| state.take_back(self.worker.number, |_| true));
                        drop(self);
                        // Nobody may be left to hear it.
                        let _ = answer.send(());
                        return;
                    }
                    self.carry_out(command);
                }
                permit = events.reserve(), if self.has_work() => {
                    let Ok(permit) = permit else { return };
                    if let Some(event) = self.work() {
                        permit.send(event);
                    }
                }
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    fn carry_out(&mut self, command: Command) {
        let hub = Arc::clone(&self.worker.hub);
        let worker = self.worker.number;
        match command {
            Command::Settle(settlements) => hub.change(|state| {
                for (tag, settlement) in settlements {
                    state.settle(tag, worker, settlement);
                }
            }),
            Command::Park { tag, due: _ } => hub.change(|state| {
                if let Some(held) = state.held.get_mut(&tag) {
                    held.parked = true;
                }
            }),
            Command::Unpark(tags) => self.unparked.extend(tags),
            Command::Prefetch(count) => self.prefetch = count as usize,
            Command::Consume(queue, answer) => {
                hub.change(|state| state.declare(&queue));
                if !self.queues.contains(&queue.name) {
                    self.queues.push_back(queue.name);
                }
                // Nobody may be left to hear it.
                let _ = answer.send(Ok(()));
            }
            Command::Cancel(name) => self.queues.retain(|queue| *queue != name),
            Command::Pause => self.paused = true,
            Command::Resume => self.paused = false,
            Command::Remember(remembrance) => hub.change(|state| state.remember(remembrance)),
            Command::Publish(publication, answer) => {
                hub.publish(&publication);
                // Nobody may be left to hear it.
                let _ = answer.send(Ok(()));
            }
            // The worker does not listen here, as Celery's does not.
            Command::Listen(_) | Command::Deafen(_) => {}
            Command::Close(_) => unreachable!("closing ends the loop that calls this"),
        }
    }

    fn room(&self, state: &State) -> usize {
        match (self.paused, self.prefetch) {
            (true, _) => 0,
            (false, 0) => BATCH,
            (false, prefetch) => {
                let mine = |held: &&Held| held.worker == self.worker.number && !held.parked;
                prefetch.saturating_sub(state.held.values().filter(mine).count()).min(BATCH)
            }
        }
    }

    fn has_work(&self) -> bool {
        let state = self.worker.hub.lock();
        let waits = |queue: &str| state.queues.get(queue).is_some_and(|queue| !queue.is_empty());
        !self.unparked.is_empty()
            || self.mailbox.as_ref().is_some_and(|mailbox| waits(&mailbox.queue))
            || (self.queues.iter().any(|queue| waits(queue)) && self.room(&state) > 0)
    }

    /// The next event, if there still is one.
    fn work(&mut self) -> Option<Event> {
        let hub = Arc::clone(&self.worker.hub);
        let mut state = hub.lock();
        if let Some(mailbox) = &self.mailbox
            && let Some(stored) = state.queues.get_mut(&mailbox.queue).and_then(VecDeque::pop_front)
        {
            return Some(Event::Control(stored.message));
        }
        if !self.unparked.is_empty() {
            return Some(self.unpark(&mut state));
        }
        let deliveries = self.claim(&mut state);
        (!deliveries.is_empty()).then_some(Event::Deliveries(deliveries))
    }

    fn unpark(&mut self, state: &mut State) -> Event {
        let mut deliveries = Vec::new();
        let mut forgotten = Vec::new();
        for tag in self.unparked.drain() {
            match state.held.get_mut(&tag) {
                Some(held) => {
                    held.parked = false;
                    deliveries.push((tag, held.stored.clone()));
                }
                None => forgotten.push(tag),
            }
        }
        if deliveries.is_empty() {
            return Event::Forgotten(forgotten);
        }
        // The rest is asked for again and comes as the next event.
        self.unparked.extend(forgotten);
        deliveries.sort_by_key(|(_, stored)| stored.place);
        Event::Deliveries(deliveries.into_iter().map(|(tag, stored)| self.delivery(tag, stored)).collect())
    }

    /// Takes from the queues in turn, so that a full one does not starve the others.
    fn claim(&mut self, state: &mut State) -> Vec<Delivery> {
        let room = self.room(state);
        let mut deliveries = Vec::new();
        let mut empty = 0;
        while deliveries.len() < room && empty < self.queues.len() {
            self.queues.rotate_left(1);
            let Some(name) = self.queues.back() else { break };
            let Some(stored) = state.queues.get_mut(name).and_then(VecDeque::pop_front) else {
                empty += 1;
                continue;
            };
            empty = 0;
            let tag = next();
            let held = Held { stored: stored.clone(), worker: self.worker.number, parked: false };
            state.held.insert(tag, held);
            deliveries.push(self.delivery(tag, stored));
        }
        deliveries
    }

    fn delivery(&self, tag: Tag, stored: Stored) -> Delivery {
        Delivery { message: stored.message, info: stored.info, handle: Handle::new(tag) }
    }
}
