//! A live session: one task that owns the connection's state. It gathers what it is told, carries it out in one
//! round trip, and waits. Whatever fails ends the session; the next one takes over.

mod claim;
mod life;
mod parking;
mod queues;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use self::claim::{CLAIM, POLL};
use self::queues::{Listener, Side, Source};
use super::batch::Batch;
use super::link::{Dialer, Link, Pushes};
use super::publish::{self, Answer};
use super::remember;
use super::restore::{self, End, Guard};
use super::routes::Bound;
use super::shared::Shared;
use super::sweep::Findings;
use crate::broker::{Command, Event, Publication, Remembrance, Settlement, Tag};
use crate::error::BrokerError;

pub(super) struct Live {
    link: Link,
    dialer: Dialer,
    /// The connection that subscribes, once there is something to subscribe to.
    subscriber: Option<Link>,
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
    /// Queues that are only listened to.
    sides: Vec<Side>,
    next_look: Instant,

    pub(super) prefetch: u32,
    pub(super) paused: bool,
    pub(super) held: HashSet<Tag>,
    /// Events that the worker had no room for; nothing is taken before they are gone.
    outbox: VecDeque<Event>,

    tracking: bool,
    batch: Batch,
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
    /// What is to be remembered and is not yet.
    pub(super) remembrances: Vec<Remembrance>,
    changes: Vec<Command>,
    closing: Option<oneshot::Sender<()>>,
}

impl Live {
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, with the parts that `connect` made one by one"
    )]
    pub(super) fn new(
        link: Link,
        dialer: Dialer,
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
            dialer,
            subscriber: None,
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
            sides: Vec::new(),
            next_look: now,
            prefetch: 0,
            paused: false,
            held: HashSet::new(),
            outbox: VecDeque::new(),
            tracking,
            batch: Batch::new(CLAIM),
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
            remembrances: Vec::new(),
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
                while let Some(event) = self.outbox.pop_front() {
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
            if self.listens_to_lists() && Instant::now() >= self.next_look {
                self.look().await?;
            }
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
        let listens = self.listens_to_lists();
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
            () = tokio::time::sleep_until(self.next_look), if listens => {}
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
                let (mut parked, mut unparking) = (shared.parked(), shared.unparking());
                self.unparks
                    .extend(tags.into_iter().filter(|tag| parked.remove(tag) && unparking.insert(*tag)));
            }
            Command::Prefetch(count) => self.prefetch = count,
            Command::Pause => self.paused = true,
            Command::Resume => self.paused = false,
            Command::Remember(remembrance) => self.remembrances.push(remembrance),
            Command::Publish(publication, answer) => self.publications.push((publication, answer)),
            command @ (Command::Consume(..)
            | Command::Cancel(_)
            | Command::Listen(_)
            | Command::Deafen(_)) => self.changes.push(command),
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
                Command::Consume(queue, answer) => {
                    self.consume(&queue).await?;
                    // Nobody may be left to hear it.
                    let _ = answer.send(Ok(()));
                }
                Command::Cancel(queue) => self.cancel(&queue).await?,
                Command::Listen(queue) => self.hark(&queue).await?,
                Command::Deafen(queue) => self.deafen(&queue).await?,
                _ => {}
            }
        }
        while let Some(remembrance) = self.remembrances.first() {
            remember::remember(&self.link, &self.shared, remembrance).await?;
            self.remembrances.remove(0);
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

    async fn close(&mut self) -> Result<(), BrokerError> {
        self.findings = None;
        self.paused = true;
        let held: Vec<Tag> = self.held.drain().collect();
        self.given_back.extend(held.into_iter().map(|tag| (tag, self.shared.field(self.session, tag))));
        self.carry_out().await?;
        self.claim().await?;
        self.tell_published();
        self.deafen_all().await?;
        if let Some(control) = self.control.take() {
            control.delete(&self.link, &self.shared).await?;
        }
        // Every answer of this session has been heard: nobody needs to look for what it left.
        restore::resign(&self.link, &self.shared, &self.owner).await
    }

    /// The session failed: what was to be deleted must be deleted by the next one, before it gives back what the
    /// worker does not hold.
    fn leave_to_the_next(&mut self) {
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            self.take(command);
        }
        self.shared.unconfirmed().append(&mut self.settled);
        self.shared.unremembered().append(&mut self.remembrances);
        self.tell_published();
        for (_, answer) in self.publications.drain(..) {
            let _ = answer.send(Err(self.link.gone("the connection was lost before the message was sent")));
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // The worker let go of the session: what it has not heard of is for the next one.
        for event in self.outbox.drain(..) {
            if let Event::Deliveries(deliveries) = event {
                for delivery in deliveries {
                    delivery.handle.abandon();
                }
            }
        }
    }
}
