//! A live session: one task that owns the connection's state. It gathers what it is told, carries it out in one
//! round trip, and waits. Whatever fails ends the session; the next one takes over.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redis::Value;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use super::envelope::{self, Malformed};
use super::link::{BEAT, Link, MOVE, Pushes, TURN};
use super::options::Order;
use super::publish::{self, Answer};
use super::restore::{self, End, Guard};
use super::routes::{self, Bound};
use super::shared::Shared;
use super::sweep::{Findings, OVERDUE_LIMIT, SILENCE};
use crate::broker::topology::{Binding, Exchange, Queue};
use crate::broker::{Command, Control, Delivery, Event, Handle, Publication, Settlement, Tag};
use crate::error::BrokerError;
use crate::protocol::{DeliveryInfo, Message};

/// Most messages taken in one go. More would only lengthen the script, which keeps everybody else waiting.
const CLAIM: usize = 64;
/// Most fields settled by one script: Lua cannot unpack many thousands.
const SETTLE: usize = 1000;
/// Signs of life, often enough that three may be missed before anybody thinks of death.
const BEAT_EVERY: Duration = Duration::from_secs(2);
/// Renewals, where the visibility timeout leaves the choice to us.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// How long others leave a parked message to the worker that parked it once it is due, seconds.
const GRACE: f64 = 3.0;
/// Without `CLIENT TRACKING`: the shortest and the longest wait between two looks.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Claims that find nothing although a list is there, before its type is asked for.
const FUTILE: u32 = 3;

/// A queue that is consumed.
struct Source {
    name: String,
    /// Its name as JSON, for the records.
    json: String,
    /// Its lists, by priority step.
    lists: Vec<String>,
}

/// Where broadcasts of a channel go.
#[derive(Clone, PartialEq)]
enum Listener {
    Control,
    /// A queue bound to a fanout exchange.
    Queue(String),
}

pub(super) struct Live {
    link: Link,
    shared: Arc<Shared>,
    session: u64,
    owner: String,
    events: mpsc::Sender<Event>,
    commands: mpsc::Receiver<Command>,
    pushes: Pushes,
    /// To the sweeper; taken when the session ends.
    pub(super) findings: Option<mpsc::Sender<Findings>>,
    pub(super) failed: mpsc::Receiver<BrokerError>,
    again: Arc<Notify>,

    /// In the order in which they are asked next.
    sources: Vec<Source>,
    listeners: HashMap<String, Vec<Listener>>,
    bound: Vec<Bound>,
    refresh_at: Option<Instant>,
    control: Option<Bound>,

    pub(super) prefetch: u32,
    paused: bool,
    pub(super) held: HashSet<Tag>,
    /// Events that the worker had no room for; nothing is taken before they are gone.
    outbox: VecDeque<Event>,

    tracking: bool,
    /// A queue may have messages: false only after all were seen empty, watched.
    ready: bool,
    poll: Duration,
    futile: u32,
    /// Lists that are none.
    skipped: HashSet<String>,
    next_beat: Instant,
    next_renewal: Instant,

    settled: Vec<String>,
    given_back: Vec<(Tag, String)>,
    requeued: Vec<String>,
    parks: Vec<(Tag, f64)>,
    unparks: Vec<Tag>,
    publications: Vec<(Box<Publication>, Answer)>,
    /// Publications that are done, told once everything that was said before them is done too.
    published: Vec<Answer>,
    changes: Vec<Command>,
    closing: Option<oneshot::Sender<()>>,
}

impl Live {
    pub(super) fn new(
        link: Link,
        shared: Arc<Shared>,
        session: u64,
        pushes: Pushes,
        tracking: bool,
        events: mpsc::Sender<Event>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        if !tracking {
            tracing::warn!(target: "celeriac.redis", address = &*shared.address,
                "The server refuses CLIENT TRACKING; queues are polled instead.");
        }
        let now = Instant::now();
        Self {
            owner: shared.owner(session),
            link,
            shared,
            session,
            events,
            commands,
            pushes,
            findings: None,
            failed: mpsc::channel(1).1,
            again: Arc::default(),
            sources: Vec::new(),
            listeners: HashMap::new(),
            bound: Vec::new(),
            refresh_at: None,
            control: None,
            prefetch: 0,
            paused: false,
            held: HashSet::new(),
            outbox: VecDeque::new(),
            tracking,
            ready: true,
            poll: POLL.0,
            futile: 0,
            skipped: HashSet::new(),
            next_beat: now,
            next_renewal: now,
            settled: Vec::new(),
            given_back: Vec::new(),
            requeued: Vec::new(),
            parks: Vec::new(),
            unparks: Vec::new(),
            publications: Vec::new(),
            published: Vec::new(),
            changes: Vec::new(),
            closing: None,
        }
    }

    /// Notified: the next beat is wanted at once.
    pub(super) fn again(&self) -> Arc<Notify> {
        Arc::clone(&self.again)
    }

    pub(super) async fn run(mut self) {
        match self.serve().await {
            Ok(answer) => {
                self.shared.ended(self.session);
                let _ = answer.send(());
            }
            Err(error) => {
                self.leave_to_the_next();
                for event in self.outbox.drain(..) {
                    let _ = self.events.send(event).await;
                }
                let _ = self.events.send(Event::Lost(error)).await;
            }
        }
    }

    async fn serve(&mut self) -> Result<oneshot::Sender<()>, BrokerError> {
        loop {
            if !self.has_work() {
                self.wait().await?;
            }
            while self.closing.is_none()
                && let Ok(command) = self.commands.try_recv()
            {
                self.take(command);
            }
            while let Ok((channel, payload)) = self.pushes.broadcasts.try_recv() {
                self.on_broadcast(&channel, payload);
            }
            self.carry_out().await?;
            if let Some(answer) = self.closing.take() {
                self.close().await?;
                return Ok(answer);
            }
            self.claim().await?;
            self.tell_published();
            if Instant::now() >= self.next_beat {
                self.beat().await?;
            }
        }
    }

    fn has_work(&self) -> bool {
        self.closing.is_some()
            || !self.settled.is_empty()
            || self.wanted() > 0
            || Instant::now() >= self.next_beat
    }

    async fn wait(&mut self) -> Result<(), BrokerError> {
        let polls = !self.tracking && !self.ready && self.room() > 0;
        let events = self.events.clone();
        tokio::select! {
            command = self.commands.recv() => match command {
                Some(command) => self.take(command),
                None => return Err(self.link.gone("the worker let go of the session")),
            },
            () = self.pushes.wake.notified(), if !self.ready => self.ready = true,
            Ok(permit) = events.reserve(), if !self.outbox.is_empty() => {
                if let Some(event) = self.outbox.pop_front() {
                    permit.send(event);
                }
            }
            Some((channel, payload)) = self.pushes.broadcasts.recv() => self.on_broadcast(&channel, payload),
            () = tokio::time::sleep_until(self.next_beat) => {}
            () = self.again.notified() => self.next_beat = Instant::now(),
            () = self.pushes.lost.cancelled() => return Err(self.link.gone("the server closed the connection")),
            error = self.failed.recv() => {
                return Err(error.unwrap_or_else(|| self.link.gone("the sweeper ended")));
            }
            () = tokio::time::sleep(self.poll), if polls => {
                self.ready = true;
                self.poll = (self.poll * 2).min(POLL.1);
            }
        }
        Ok(())
    }

    /// Tells the worker, in order, without ever waiting for it.
    pub(super) fn emit(&mut self, event: Event) {
        if !self.outbox.is_empty() {
            self.outbox.push_back(event);
        } else if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            self.outbox.push_back(event);
        }
    }

    // ---- what the worker says

    fn take(&mut self, command: Command) {
        match command {
            Command::Settle(settlements) => {
                settlements.into_iter().for_each(|(tag, settlement)| self.settle(tag, settlement));
            }
            Command::Park { tag, due } => {
                if self.held.remove(&tag) {
                    self.shared.parked().insert(tag);
                    self.parks.push((tag, due));
                }
            }
            Command::Unpark(tags) => {
                let shared = Arc::clone(&self.shared);
                let mut parked = shared.parked();
                self.unparks.extend(tags.into_iter().filter(|tag| parked.remove(tag)));
            }
            Command::Prefetch(count) => self.prefetch = count,
            Command::Pause => self.paused = true,
            Command::Publish(publication, answer) => self.publications.push((publication, answer)),
            command @ (Command::Consume(_) | Command::Cancel(_)) => self.changes.push(command),
            Command::Close(answer) => self.closing = Some(answer),
        }
    }

    fn settle(&mut self, tag: Tag, settlement: Settlement) {
        if self.shared.fleeting().remove(&tag) {
            if !matches!(settlement, Settlement::Ack | Settlement::Reject) {
                tracing::warn!(target: "celeriac.redis", tag,
                    "A broadcast cannot go back: Redis keeps no copy of it.");
            }
            return;
        }
        let field = if self.held.remove(&tag) {
            self.shared.field(self.session, tag)
        } else if self.shared.parked().remove(&tag) {
            self.shared.parked_field(tag)
        } else {
            return;
        };
        match settlement {
            Settlement::Ack | Settlement::Reject => self.settled.push(field),
            Settlement::Requeue => self.requeued.push(field),
            Settlement::GiveBack => self.given_back.push((tag, field)),
        }
    }

    /// Everything gathered but acknowledgements, which travel with the next claim.
    async fn carry_out(&mut self) -> Result<(), BrokerError> {
        for command in std::mem::take(&mut self.changes) {
            match command {
                Command::Consume(queue) => self.consume(&queue).await?,
                Command::Cancel(queue) => self.cancel(&queue).await?,
                _ => {}
            }
        }
        if !self.publications.is_empty() {
            let publications = std::mem::take(&mut self.publications);
            self.published.extend(publish::publish(&self.link, &self.shared, publications).await?);
        }
        if !self.parks.is_empty() {
            self.park().await?;
        }
        if !self.unparks.is_empty() {
            self.unpark().await?;
        }
        if !self.requeued.is_empty() {
            restore::put_back(&self.link, &self.shared, &self.requeued, End::Tail, Guard::Ours).await?;
            self.requeued.clear();
        }
        if !self.given_back.is_empty() {
            // Pushed last taken first, so that the first taken is next in line.
            self.given_back.sort_unstable_by_key(|(tag, _)| std::cmp::Reverse(*tag));
            let fields: Vec<String> = self.given_back.iter().map(|(_, field)| field.clone()).collect();
            restore::put_back(&self.link, &self.shared, &fields, End::Head, Guard::Ours).await?;
            self.given_back.clear();
        }
        Ok(())
    }

    fn tell_published(&mut self) {
        for answer in self.published.drain(..) {
            let _ = answer.send(Ok(()));
        }
    }

    async fn park(&mut self) -> Result<(), BrokerError> {
        let timeout = self.shared.options.visibility_timeout;
        let parks = std::mem::take(&mut self.parks);
        let moves = parks.iter().map(|(tag, due)| {
            (
                self.shared.field(self.session, *tag),
                self.shared.parked_field(*tag),
                (due - timeout).to_string(),
            )
        });
        let moved = self.rename(moves.collect(), false).await?;
        let gone: Vec<Tag> =
            parks.iter().zip(moved).filter(|(_, moved)| moved.is_none()).map(|((tag, _), _)| *tag).collect();
        if !gone.is_empty() {
            self.shared.parked().retain(|tag| !gone.contains(tag));
            self.emit(Event::Forgotten(gone));
        }
        Ok(())
    }

    async fn unpark(&mut self) -> Result<(), BrokerError> {
        let tags = std::mem::take(&mut self.unparks);
        let moves = tags.iter().map(|tag| {
            (self.shared.parked_field(*tag), self.shared.field(self.session, *tag), String::new())
        });
        let records = self.rename(moves.collect(), true).await?;
        let (mut deliveries, mut gone) = (Vec::new(), Vec::new());
        for (tag, record) in tags.into_iter().zip(records) {
            match record {
                Some(record) => self.deliver(tag, envelope::taken(&record), &record, &mut deliveries),
                None => gone.push(tag),
            }
        }
        if !gone.is_empty() {
            self.emit(Event::Forgotten(gone));
        }
        if !deliveries.is_empty() {
            self.emit(Event::Deliveries(deliveries));
        }
        Ok(())
    }

    async fn rename(
        &self,
        moves: Vec<(String, String, String)>,
        with_records: bool,
    ) -> Result<Vec<Option<Vec<u8>>>, BrokerError> {
        let mut answers = Vec::with_capacity(moves.len());
        for moves in moves.chunks(CLAIM) {
            let mut call = self.shared.call();
            call.arg(&self.owner).arg(i64::from(with_records));
            for (old, new, score) in moves {
                call.arg(old).arg(new).arg(score);
            }
            let answer: Option<Vec<Value>> = self.link.eval(&MOVE, &call).await?;
            let answer = answer.ok_or_else(|| self.declared_dead())?;
            answers.extend(answer.into_iter().map(|value| match value {
                Value::Nil => None,
                Value::BulkString(record) => Some(record),
                _ => Some(Vec::new()),
            }));
        }
        Ok(answers)
    }

    // ---- queues

    pub(super) async fn consume(&mut self, queue: &Queue) -> Result<(), BrokerError> {
        let bound = routes::declare(&self.link, &self.shared, queue).await?;
        self.refresh_later(&bound);
        self.bound.extend(bound);
        let fanouts = queue.bindings.iter().filter(|binding| binding.exchange.kind == "fanout");
        let channels: Vec<String> = fanouts
            .map(|binding| {
                self.shared.keys.channel(&binding.exchange.name, &binding.routing_key.replace('#', "*"))
            })
            .collect();
        if channels.is_empty() {
            if self.sources.iter().all(|source| source.name != queue.name) {
                self.sources.push(Source {
                    name: queue.name.clone(),
                    json: serde_json::Value::from(queue.name.as_str()).to_string(),
                    lists: self.shared.keys.lists_of(&queue.name),
                });
                if self.shared.options.order == Order::Sorted {
                    self.sources.sort_by(|a, b| a.name.cmp(&b.name));
                }
            }
            self.ready = true;
        }
        for channel in channels {
            self.subscribe(channel, Listener::Queue(queue.name.clone())).await?;
        }
        Ok(())
    }

    async fn subscribe(&mut self, channel: String, listener: Listener) -> Result<(), BrokerError> {
        self.link.subscribe(&channel).await?;
        let listeners = self.listeners.entry(channel).or_default();
        if !listeners.contains(&listener) {
            listeners.push(listener);
        }
        Ok(())
    }

    async fn cancel(&mut self, name: &str) -> Result<(), BrokerError> {
        self.sources.retain(|source| source.name != name);
        self.bound.retain(|bound| bound.queue != name);
        let listener = Listener::Queue(name.to_owned());
        let mut silent = Vec::new();
        for (channel, listeners) in &mut self.listeners {
            listeners.retain(|other| *other != listener);
            if listeners.is_empty() {
                silent.push(channel.clone());
            }
        }
        for channel in silent {
            self.listeners.remove(&channel);
            self.link.unsubscribe(&channel).await?;
        }
        Ok(())
    }

    /// Listens to remote control, as kombu's mailbox: a queue of the node's, bound to a fanout exchange.
    pub(super) async fn listen(&mut self, node: &str, control: &Control) -> Result<(), BrokerError> {
        let exchange = format!("{}.pidbox", control.exchange);
        let mut queue = Queue::named(&format!("{node}.{exchange}"));
        let channel = self.shared.keys.channel(&exchange, "");
        let exchange =
            Exchange { name: exchange, kind: "fanout".to_owned(), ..queue.bindings[0].exchange.clone() };
        queue.bindings =
            vec![Binding { exchange, routing_key: String::new(), arguments: serde_json::Map::new() }];
        if let Some(expires) = control.queue_expires {
            queue.arguments.insert("x-expires".to_owned(), (expires * 1000.0).into());
        }
        let bound = routes::declare(&self.link, &self.shared, &queue).await?;
        self.refresh_later(&bound);
        self.control = bound.first().cloned();
        self.bound.extend(bound);
        self.subscribe(channel, Listener::Control).await
    }

    fn refresh_later(&mut self, bound: &[Bound]) {
        if let Some(interval) = bound.iter().filter_map(Bound::interval).min() {
            let at = Instant::now() + interval;
            self.refresh_at = Some(self.refresh_at.map_or(at, |before| before.min(at)));
        }
    }

    fn on_broadcast(&mut self, channel: &str, payload: Bytes) {
        // None: cancelled a moment ago.
        for listener in self.listeners.get(channel).cloned().unwrap_or_default() {
            let queue = match &listener {
                Listener::Control => "",
                Listener::Queue(queue) => queue.as_str(),
            };
            match envelope::read(&payload, queue) {
                Err(error) => {
                    let preview = restore::preview(&payload);
                    tracing::warn!(target: "kombu.transport.redis", channel, %error, preview,
                        "Cannot process event on channel.");
                }
                Ok((message, _)) if listener == Listener::Control => self.emit(Event::Control(message)),
                Ok((message, info)) => {
                    let tag = self.shared.tags(1);
                    self.shared.fleeting().insert(tag);
                    let handle = Handle::new(tag, self.session);
                    self.emit(Event::Deliveries(vec![Delivery { message, info, handle }]));
                }
            }
        }
    }

    // ---- messages

    /// How many more deliveries the worker may hold.
    fn room(&self) -> usize {
        if self.paused || self.sources.is_empty() {
            return 0;
        }
        match self.prefetch {
            0 => CLAIM,
            count => (count as usize).saturating_sub(self.held.len()).min(CLAIM),
        }
    }

    /// How many messages the next turn asks for.
    fn wanted(&self) -> usize {
        if self.ready && self.outbox.is_empty() { self.room() } else { 0 }
    }

    /// One turn: deletes what is settled and takes what there is room for.
    async fn claim(&mut self) -> Result<(), BrokerError> {
        while !self.settled.is_empty() || self.wanted() > 0 {
            // The fields stay in `settled` until the server has answered.
            let settled = self.settled.len().min(SETTLE);
            let wanted = if settled == self.settled.len() { self.wanted() } else { 0 };
            let tags = self.shared.tags(wanted as u64);
            let mut call = self.shared.call();
            if wanted > 0 {
                for step in 0..self.sources.first().map_or(0, |source| source.lists.len()) {
                    self.sources.iter().for_each(|source| call.key(source.lists[step].clone()));
                }
            }
            let fair = self.shared.options.order == Order::RoundRobin;
            let sources = if wanted > 0 { self.sources.len() } else { 0 };
            call.arg(&self.owner).arg(tags).arg(wanted).arg(i64::from(fair)).arg(sources).arg(settled);
            for source in self.sources.iter().take(sources) {
                call.arg(&source.json);
            }
            for field in &self.settled[..settled] {
                call.arg(field);
            }
            let answer: Option<Vec<Value>> = self.link.eval(&TURN, &call).await?;
            self.settled.drain(..settled);
            let taken = answer.ok_or_else(|| self.declared_dead())?;
            if wanted > 0 {
                let count = self.on_taken(tags, taken);
                if count < wanted {
                    self.watch(count).await?;
                }
                return Ok(());
            }
        }
        Ok(())
    }

    fn on_taken(&mut self, first: Tag, taken: Vec<Value>) -> usize {
        let mut deliveries = Vec::with_capacity(taken.len() / 2);
        let mut rotation = Vec::with_capacity(taken.len() / 2);
        let mut values = taken.into_iter();
        let mut tag = first;
        while let (Some(Value::Int(number)), Some(Value::BulkString(item))) = (values.next(), values.next()) {
            let index = usize::try_from(number - 1).unwrap_or(0).min(self.sources.len() - 1);
            let read = envelope::read(&item, &self.sources[index].name);
            self.deliver(tag, read, &item, &mut deliveries);
            rotation.push(index);
            tag += 1;
        }
        if !deliveries.is_empty() {
            self.emit(Event::Deliveries(deliveries));
        }
        self.rotate(&rotation);
        rotation.len()
    }

    fn deliver(
        &mut self,
        tag: Tag,
        read: Result<(Message, DeliveryInfo), Malformed>,
        item: &[u8],
        deliveries: &mut Vec<Delivery>,
    ) {
        match read {
            Ok((message, info)) => {
                self.held.insert(tag);
                deliveries.push(Delivery { message, info, handle: Handle::new(tag, self.session) });
            }
            Err(error) => {
                tracing::error!(target: "celeriac.redis", %error, preview = restore::preview(item),
                    "Dropped an item of a queue that is no message.");
                self.settled.push(self.shared.field(self.session, tag));
            }
        }
    }

    /// In turns: who delivered goes to the end, the last one last.
    fn rotate(&mut self, delivered: &[usize]) {
        if self.shared.options.order != Order::RoundRobin || self.sources.len() < 2 {
            return;
        }
        let last: HashMap<usize, usize> =
            delivered.iter().enumerate().map(|(position, index)| (*index, position + 1)).collect();
        let mut sources: Vec<(usize, Source)> = self
            .sources
            .drain(..)
            .enumerate()
            .map(|(index, source)| (last.get(&index).copied().unwrap_or(0), source))
            .collect();
        sources.sort_by_key(|(position, _)| *position);
        self.sources = sources.into_iter().map(|(_, source)| source).collect();
    }

    /// All queues seemed empty: looks again in a way that makes the server tell us when one is not.
    async fn watch(&mut self, count: usize) -> Result<(), BrokerError> {
        if count > 0 {
            self.poll = POLL.0;
            self.futile = 0;
        }
        if !self.tracking {
            self.ready = false;
            return Ok(());
        }
        let lists = self.sources.iter().flat_map(|source| &source.lists);
        self.ready = self.link.watch(lists.filter(|list| !self.skipped.contains(*list))).await? > 0;
        if self.ready && count == 0 {
            self.futile += 1;
            if self.futile >= FUTILE {
                self.futile = 0;
                self.skip_what_is_no_list().await?;
            }
        }
        Ok(())
    }

    async fn skip_what_is_no_list(&mut self) -> Result<(), BrokerError> {
        let lists: Vec<String> = self.sources.iter().flat_map(|source| source.lists.clone()).collect();
        let mut pipeline = redis::pipe();
        for list in &lists {
            pipeline.cmd("TYPE").arg(list);
        }
        let types: Vec<String> = self.link.pipe(&pipeline).await?;
        for (list, kind) in lists.into_iter().zip(types) {
            if kind != "list" && kind != "none" && !self.skipped.contains(&list) {
                tracing::error!(target: "celeriac.redis", key = list, kind,
                    "The key of a queue is no list; nothing can be taken from it until it is deleted.");
                self.skipped.insert(list);
            }
        }
        Ok(())
    }

    // ---- life

    async fn beat(&mut self) -> Result<(), BrokerError> {
        let timeout = self.shared.options.visibility_timeout;
        let third = Duration::from_secs_f64((timeout / 3.0).clamp(0.05, 60.0));
        let now = Instant::now();
        let renews = now >= self.next_renewal;
        let held: Vec<Tag> = if renews { self.held.iter().copied().collect() } else { Vec::new() };
        let mut call =
            super::link::Call::new([self.shared.keys.workers.as_str(), &self.shared.keys.unacked_index]);
        call.arg(&self.owner).arg(timeout).arg(GRACE).arg(SILENCE).arg(OVERDUE_LIMIT);
        for tag in &held {
            call.arg(self.shared.field(self.session, *tag));
        }
        type Beat = (String, Vec<usize>, Vec<String>, Vec<String>);
        let beat: Option<Beat> = self.link.eval(&BEAT, &call).await?;
        let (time, gone, overdue, silent) = beat.ok_or_else(|| self.declared_dead())?;
        let gone: Vec<Tag> =
            gone.into_iter().filter_map(|number| held.get(number.wrapping_sub(1)).copied()).collect();
        if !gone.is_empty() {
            for tag in &gone {
                self.held.remove(tag);
            }
            self.emit(Event::Forgotten(gone));
        }
        if !overdue.is_empty() || !silent.is_empty() {
            let silent = silent.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
            let findings = Findings { now: time.parse().unwrap_or(0.0), overdue, silent };
            if let Some(sweeper) = &self.findings {
                // Still busy with the last ones: the next beat finds them again.
                let _ = sweeper.try_send(findings);
            }
        }
        if renews {
            self.next_renewal = now + third.min(RENEW_EVERY);
        }
        self.next_beat = now + third.min(BEAT_EVERY);
        if !self.skipped.is_empty() {
            self.skipped.clear();
            self.ready = true;
        }
        if self.refresh_at.is_some_and(|at| now >= at) {
            self.refresh_at = None;
            let bound = self.bound.clone();
            for binding in bound.iter().filter(|binding| binding.interval().is_some()) {
                binding.declare(&self.link, &self.shared).await?;
            }
            self.refresh_later(&bound);
        }
        Ok(())
    }

    fn declared_dead(&self) -> BrokerError {
        self.link.gone("another worker took this one for dead: it was stopped or cut off for too long")
    }

    async fn close(&mut self) -> Result<(), BrokerError> {
        self.findings = None;
        self.paused = true;
        let mut held: Vec<Tag> = self.held.drain().collect();
        held.sort_unstable();
        self.given_back = held.into_iter().map(|tag| (tag, self.shared.field(self.session, tag))).collect();
        self.carry_out().await?;
        self.claim().await?;
        self.tell_published();
        if let Some(control) = self.control.take() {
            control.delete(&self.link, &self.shared).await?;
        }
        // What is left, if anything, goes with the registration.
        if let Some(score) = restore::mark_dead(&self.link, &self.shared, &self.owner, None).await? {
            restore::bury(&self.link, &self.shared, &self.owner, &score).await?;
        }
        Ok(())
    }

    /// The session failed: what was to be deleted must be deleted by the next one, before it gives back what the
    /// worker does not hold.
    fn leave_to_the_next(&mut self) {
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            self.take(command);
        }
        self.shared.unconfirmed().append(&mut self.settled);
        self.tell_published();
    }
}
