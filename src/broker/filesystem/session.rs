//! A session: the loop that claims files, carries out commands and listens to the kernel.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::desk::{self, Desk, Taken};
use super::names::FileName;
use super::{Held, Worker, exchange};
use crate::broker::envelope;
use crate::broker::topology::Queue;
use crate::broker::{
    COMMAND_CAPACITY, Command, Consume, Delivery, EVENT_CAPACITY, Event, Handle, Publication, Session, Tag,
};
use crate::protocol::{DeliveryInfo, Message};

/// Deliveries handed over in one event at most.
const BATCH: usize = 32;
/// Events of the kernel heard at once at most: commands are not kept waiting for more.
const NEWS: usize = 512;
/// A file that makes no sense is given so long to be completed: kombu's producer opens it before it locks it.
const GRACE: Duration = Duration::from_secs(2);
/// A dead worker's lock goes a moment after its file is closed, which is what we are told of; when to look again.
const LOOK_AGAIN: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(200), Duration::from_secs(2)];

/// Starts a session.
pub(super) fn open(worker: Arc<Worker>, consume: &Consume) -> io::Result<Session> {
    worker.folders.create()?;
    let (desk, forgotten) = worker.desk()?;
    let (event_sender, events) = mpsc::channel(EVENT_CAPACITY);
    let (commands, command_receiver) = mpsc::channel(COMMAND_CAPACITY);
    let mut consumer = Consumer {
        kernel: Kernel::listen(&worker)?,
        worker,
        desk,
        queues: VecDeque::new(),
        waiting: HashMap::new(),
        kinds: HashMap::new(),
        mailbox: None,
        prefetch: consume.prefetch as usize,
        paused: consume.paused,
        unparked: HashSet::new(),
        unreadable: HashMap::new(),
        look_again: VecDeque::new(),
        events: event_sender,
    };
    consumer.worker.give_back(&consumer.desk, |tag| !consume.held.contains(&tag));
    consumer.desk.recover()?;
    for queue in &consume.queues {
        consumer.declare(queue)?;
        consumer.queues.push_back(queue.name.clone());
        consumer.waiting.insert(queue.name.clone(), BTreeSet::new());
    }
    if let Some(control) = &consume.control {
        let exchange = format!("{}.pidbox", control.exchange);
        let queue = format!("{}.{exchange}", consume.node);
        consumer.open_mailbox(exchange, queue)?;
    }
    consumer.list()?;
    if !forgotten.is_empty() {
        // The channel is new: there is room.
        let _ = consumer.events.try_send(Event::Forgotten(forgotten));
    }
    let mut tasks = JoinSet::new();
    tasks.spawn(consumer.run(command_receiver));
    Ok(Session { events, commands, tasks })
}

/// The kernel's word on the folders.
struct Kernel {
    events: EventStream<Vec<u8>>,
    incoming: WatchDescriptor,
    desks: WatchDescriptor,
}

impl Kernel {
    fn listen(worker: &Worker) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let files = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let incoming = inotify.watches().add(&worker.folders.incoming, files)?;
        let desks = Desk::folder_in(&worker.folders.incoming);
        let desks = inotify.watches().add(desks, WatchMask::CLOSE_WRITE | WatchMask::ONLYDIR)?;
        Ok(Self { events: inotify.into_event_stream(vec![0; 16 * 1024])?, incoming, desks })
    }
}

/// What the kernel has told.
#[derive(Default)]
struct News {
    appeared: HashSet<String>,
    gone: HashSet<String>,
    a_worker_went: bool,
    events_were_lost: bool,
    folder_is_gone: bool,
    count: usize,
}

/// A session's task.
struct Consumer {
    kernel: Kernel,
    worker: Arc<Worker>,
    desk: Arc<Desk>,
    /// Consumed queues; the one served last is last.
    queues: VecDeque<String>,
    /// Files that wait, of the consumed queues and the mailbox. Some may be gone already.
    waiting: HashMap<String, BTreeSet<FileName>>,
    /// Kinds of exchanges that were declared.
    kinds: HashMap<String, String>,
    mailbox: Option<Mailbox>,
    prefetch: usize,
    paused: bool,
    /// Parked deliveries that were asked for.
    unparked: HashSet<Tag>,
    /// Files that make no sense, and since when.
    unreadable: HashMap<String, Instant>,
    /// When to look after dead workers again.
    look_again: VecDeque<Instant>,
    events: mpsc::Sender<Event>,
}

/// The queue of remote control.
struct Mailbox {
    exchange: String,
    queue: String,
}

impl Consumer {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let events = self.events.clone();
            let wake = self.wake();
            let result = tokio::select! {
                // Commands first: what was told is done before more is fetched.
                biased;
                command = commands.recv() => match command {
                    None => return,
                    Some(Command::Close(answer)) => {
                        self.worker.give_back(&self.desk, |_| true);
                        self.close_mailbox();
                        drop(self);
                        // Nobody may be left to hear it.
                        let _ = answer.send(());
                        return;
                    }
                    Some(command) => self.carry_out(command),
                },
                permit = events.reserve(), if self.has_work() => {
                    let Ok(permit) = permit else { return };
                    self.work().map(|event| if let Some(event) = event { permit.send(event) })
                }
                news = listen(&mut self.kernel) => news.and_then(|news| self.hear(news)),
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.look_again(),
            };
            if let Err(error) = result {
                let error = self.worker.error(&error);
                // Nobody may be left to hear it.
                let _ = self.events.send(Event::Lost(error)).await;
                return;
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> io::Result<()> {
        match command {
            Command::Settle(settlements) => {
                for (tag, settlement) in settlements {
                    self.worker.settle(&self.desk, tag, settlement);
                }
            }
            Command::Park { tag, due: _ } => {
                let mut holding = self.worker.lock();
                if let Some(held) = holding.held.remove(&tag) {
                    holding.parked.insert(tag, held);
                }
            }
            Command::Unpark(tags) => self.unparked.extend(tags),
            Command::Prefetch(count) => self.prefetch = count as usize,
            Command::Consume(queue, answer) => {
                if !self.queues.contains(&queue.name) {
                    self.declare(&queue)?;
                    self.queues.push_back(queue.name.clone());
                    self.waiting.insert(queue.name, BTreeSet::new());
                    self.list()?;
                }
                // Nobody may be left to hear it.
                let _ = answer.send(Ok(()));
            }
            Command::Cancel(name) => {
                self.queues.retain(|queue| *queue != name);
                self.waiting.remove(&name);
            }
            Command::Pause => self.paused = true,
            Command::Resume => self.paused = false,
            // Folders remember nothing, and say so.
            Command::Remember(_) => {}
            // The worker does not listen here, as Celery's does not.
            Command::Listen(_) | Command::Deafen(_) => {}
            Command::Publish(publication, answer) => {
                let declared = publication.declare.as_deref().map_or(Ok(()), |queue| self.declare(queue));
                let result = declared
                    .and_then(|()| self.publish(&publication))
                    .map_err(|error| self.worker.error(&error));
                // Nobody may be left to hear it.
                let _ = answer.send(result);
            }
            Command::Close(_) => unreachable!("closing ends the loop that calls this"),
        }
        Ok(())
    }

    fn declare(&mut self, queue: &Queue) -> io::Result<()> {
        if queue.no_declare {
            return Ok(());
        }
        for binding in &queue.bindings {
            let (exchange, key) = (&binding.exchange, &binding.routing_key);
            if exchange.name.is_empty() || exchange.no_declare {
                continue;
            }
            let pattern = if exchange.kind == "topic" { exchange::pattern(key) } else { String::new() };
            self.worker.folders.tables.bind(&exchange.name, (key.clone(), pattern, queue.name.clone()))?;
            self.kinds.insert(exchange.name.clone(), exchange.kind.clone());
        }
        Ok(())
    }

    fn open_mailbox(&mut self, exchange: String, queue: String) -> io::Result<()> {
        self.worker.folders.tables.bind(&exchange, (String::new(), String::new(), queue.clone()))?;
        self.kinds.insert(exchange.clone(), "fanout".to_owned());
        // What was sent to an earlier worker of this name is not for us: a `shutdown` of yesterday must not stop us.
        self.purge(&queue)?;
        self.waiting.insert(queue.clone(), BTreeSet::new());
        self.mailbox = Some(Mailbox { exchange, queue });
        Ok(())
    }

    fn close_mailbox(&mut self) {
        let Some(Mailbox { exchange, queue }) = self.mailbox.take() else { return };
        let result = self.worker.folders.tables.unbind(&exchange, &queue).and_then(|()| self.purge(&queue));
        if let Err(error) = result {
            tracing::warn!(target: "celery.worker.consumer", queue, "The queue of remote control stays behind: {error}");
        }
    }

    fn purge(&self, queue: &str) -> io::Result<()> {
        for entry in fs::read_dir(&self.worker.folders.incoming)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_str().and_then(FileName::parse).is_some_and(|(_, of)| of == queue) {
                // Somebody may have been faster.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn publish(&self, publication: &Publication) -> io::Result<()> {
        let (text, _) = envelope::write(publication, true).map_err(io::Error::other)?;
        let text = text.into_bytes();
        if publication.exchange.is_empty() {
            return self.worker.put(&publication.routing_key, &text);
        }
        let declared = self.kinds.get(&publication.exchange);
        let kind = publication.exchange_type.as_ref().or(declared).map_or("direct", String::as_str);
        let table = self.worker.folders.tables.read(&publication.exchange)?;
        for queue in exchange::route(&table, kind, &publication.routing_key) {
            self.worker.put(&queue, &text)?;
        }
        Ok(())
    }

    /// Looks through the whole folder: at the start, for a new queue, and when the kernel had too much to tell.
    fn list(&mut self) -> io::Result<()> {
        for entry in fs::read_dir(&self.worker.folders.incoming)? {
            if let Some(name) = entry?.file_name().to_str() {
                self.appeared(name);
            }
        }
        Ok(())
    }

    fn appeared(&mut self, name: &str) {
        if let Some((file, queue)) = FileName::parse(name)
            && let Some(waiting) = self.waiting.get_mut(queue)
        {
            waiting.insert(file);
        }
    }

    fn hear(&mut self, news: News) -> io::Result<()> {
        if news.folder_is_gone {
            let folder = self.worker.folders.incoming.display();
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{folder} was removed")));
        }
        for name in &news.gone {
            self.unreadable.remove(name);
            if let Some((file, queue)) = FileName::parse(name)
                && let Some(waiting) = self.waiting.get_mut(queue)
            {
                waiting.remove(&file);
            }
        }
        for name in &news.appeared {
            self.appeared(name);
        }
        if news.events_were_lost {
            self.list()?;
        }
        if (news.a_worker_went || news.events_were_lost) && self.desk.recover()? {
            let now = Instant::now();
            self.look_again = LOOK_AGAIN.iter().map(|after| now + *after).collect();
        }
        Ok(())
    }

    fn wake(&self) -> Option<Instant> {
        let unreadable = self.unreadable.values().min().map(|since| *since + GRACE);
        unreadable.into_iter().chain(self.look_again.front().copied()).min()
    }

    fn look_again(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if self.look_again.front().is_some_and(|at| *at <= now) {
            self.look_again.pop_front();
            if !self.desk.recover()? {
                self.look_again.clear();
            }
        }
        let due: Vec<String> = self
            .unreadable
            .iter()
            .filter(|(_, since)| **since + GRACE <= now)
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            self.unreadable.remove(&name);
            if let Some((_, queue)) = FileName::parse(&name) {
                let queue = queue.to_owned();
                self.examine(&name, &queue)?;
            }
        }
        Ok(())
    }

    /// Looks a last time at a file that made no sense.
    fn examine(&mut self, name: &str, queue: &str) -> io::Result<()> {
        match self.desk.take(name, queue)? {
            Taken::Message(_) => {
                // It does now: back with it, to be claimed in its turn.
                self.desk.give_back(name, name)?;
            }
            Taken::Gone | Taken::Busy => {}
            Taken::Unreadable(reason) => {
                let aside = self.desk.put_aside(name);
                tracing::error!(
                    target: "celery.worker.consumer",
                    "Received and put aside a file that is no message: {name}: {reason}"
                );
                if let Err(error) = aside {
                    tracing::error!(target: "celery.worker.consumer", "{name} cannot be put aside: {error}");
                }
            }
        }
        Ok(())
    }

    fn room(&self) -> usize {
        match (self.paused, self.prefetch) {
            (true, _) => 0,
            (false, 0) => BATCH,
            (false, prefetch) => prefetch.saturating_sub(self.worker.active()).min(BATCH),
        }
    }

    fn has_work(&self) -> bool {
        let waits = |queue: &str| self.waiting.get(queue).is_some_and(|files| !files.is_empty());
        !self.unparked.is_empty()
            || self.mailbox.as_ref().is_some_and(|mailbox| waits(&mailbox.queue))
            || (self.queues.iter().any(|queue| waits(queue)) && self.room() > 0)
    }

    /// The next event, if there still is one.
    fn work(&mut self) -> io::Result<Option<Event>> {
        if let Some(event) = self.read_mail()? {
            return Ok(Some(event));
        }
        if !self.unparked.is_empty() {
            return self.unpark().map(Some);
        }
        let deliveries = self.claim()?;
        Ok((!deliveries.is_empty()).then_some(Event::Deliveries(deliveries)))
    }

    fn read_mail(&mut self) -> io::Result<Option<Event>> {
        let Some(queue) = self.mailbox.as_ref().map(|mailbox| mailbox.queue.clone()) else { return Ok(None) };
        while let Some(name) = self.first_of(&queue) {
            if let Some((message, _)) = self.take(&name, &queue)? {
                self.desk.finish(&name, self.worker.folders.processed.as_deref())?;
                return Ok(Some(Event::Control(message)));
            }
        }
        Ok(None)
    }

    fn first_of(&mut self, queue: &str) -> Option<String> {
        let file = self.waiting.get_mut(queue)?.pop_first()?;
        Some(file.as_str().to_owned())
    }

    fn unpark(&mut self) -> io::Result<Event> {
        let mut deliveries = Vec::new();
        let mut forgotten = Vec::new();
        for tag in std::mem::take(&mut self.unparked) {
            let held = self.worker.lock().parked.remove(&tag);
            let taken = held.map(|held| self.desk.again(&held.name, &held.queue).map(|taken| (held, taken)));
            let Some((held, Taken::Message(message))) = taken.transpose()? else {
                forgotten.push(tag);
                continue;
            };
            self.worker.lock().held.insert(tag, held);
            let (message, info) = *message;
            deliveries.push(Delivery { message, info, handle: Handle::new(tag) });
        }
        if deliveries.is_empty() {
            return Ok(Event::Forgotten(forgotten));
        }
        // The rest is asked for again and comes as the next event.
        self.unparked.extend(forgotten);
        Ok(Event::Deliveries(deliveries))
    }

    /// Takes from the queues in turn, so that a full one does not starve the others.
    fn claim(&mut self) -> io::Result<Vec<Delivery>> {
        let room = self.room();
        let mut deliveries = Vec::new();
        let mut empty = 0;
        while deliveries.len() < room && empty < self.queues.len() {
            self.queues.rotate_left(1);
            let Some(queue) = self.queues.back().cloned() else { break };
            let Some(name) = self.first_of(&queue) else {
                empty += 1;
                continue;
            };
            empty = 0;
            if let Some((message, info)) = self.take(&name, &queue)? {
                let tag = self.worker.hold(Held { name, queue });
                deliveries.push(Delivery { message, info, handle: Handle::new(tag) });
            }
        }
        Ok(deliveries)
    }

    /// Takes a file that seems to wait.
    fn take(&mut self, name: &str, queue: &str) -> io::Result<Option<(Message, DeliveryInfo)>> {
        match self.desk.take(name, queue)? {
            Taken::Message(message) => {
                self.unreadable.remove(name);
                return Ok(Some(*message));
            }
            Taken::Gone => {
                self.unreadable.remove(name);
            }
            // Its writer closes it, and we shall hear of that.
            Taken::Busy => {}
            Taken::Unreadable(_) => {
                self.unreadable.entry(name.to_owned()).or_insert_with(Instant::now);
            }
        }
        Ok(None)
    }
}

impl News {
    fn add(&mut self, event: EventOwned, kernel: (&WatchDescriptor, &WatchDescriptor)) {
        let name = event.name.as_deref().and_then(OsStr::to_str);
        let (incoming, desks) = kernel;
        let is = |mask| event.mask.intersects(mask);
        if is(EventMask::Q_OVERFLOW) {
            self.events_were_lost = true;
        } else if event.wd == *desks {
            self.a_worker_went |= name.is_some_and(|name| name.ends_with(".lock"));
        } else if event.wd == *incoming {
            match name {
                _ if is(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED) => {
                    self.folder_is_gone = true;
                }
                Some(name) if is(EventMask::CLOSE_WRITE | EventMask::MOVED_TO) => {
                    self.gone.remove(name);
                    self.appeared.insert(name.to_owned());
                }
                Some(name) => {
                    // The folder above outlives its name while a file in it is open: ours is.
                    self.folder_is_gone |= name == desk::FOLDER;
                    self.appeared.remove(name);
                    self.gone.insert(name.to_owned());
                }
                None => {}
            }
        }
    }
}

/// Waits for news.
///
/// # Cancel safety
/// Nothing is taken before something is there, and then it is returned without waiting again.
async fn listen(kernel: &mut Kernel) -> io::Result<News> {
    let watches = (&kernel.incoming, &kernel.desks);
    let mut news = News::default();
    let mut next = Some(kernel.events.next().await);
    while let Some(event) = next {
        let event = event.ok_or_else(|| io::Error::other("inotify has ended"))?;
        news.add(event?, watches);
        news.count += 1;
        next = if news.count < NEWS { kernel.events.next().now_or_never() } else { None };
    }
    Ok(news)
}
