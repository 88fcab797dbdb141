//! The worker's end of the broker: connects, connects again, and remembers what is held.
//!
//! One session at a time. What was to be told to a lost session is told to the next where the broker settles
//! across sessions; elsewhere it is dropped, because the broker has already requeued those messages.

use std::collections::{HashSet, VecDeque};
use std::future::pending;
use std::pin::Pin;

use futures_util::future::select_all;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::broker::reconnect::{Failover, Next, Why};
use crate::broker::topology::Queue;
use crate::broker::{Broker, Command, Consume, Delivery, Event, Session, Settlement, Tag};
use crate::error::BrokerError;

type Connecting = Pin<Box<dyn Future<Output = Result<Session, BrokerError>> + Send>>;

enum State {
    Waiting(Instant),
    Connecting(Connecting),
    Up(Box<Session>),
    /// Given up, or closed on purpose.
    Over,
}

/// The broker's answer to a request to consume a queue.
pub(super) type Consuming = Result<(), BrokerError>;

/// A queue that the broker has been asked to let us consume. It is one of ours once the broker agrees: one that is
/// refused would have the next connection refused as well.
struct Wanted {
    queue: Queue,
    heard: oneshot::Receiver<Consuming>,
    answer: oneshot::Sender<Consuming>,
}

/// What happens on the link.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// Connected to this (masked) address and consuming.
    Up {
        /// Masked.
        address: String,
        /// Another server than the last: it knows nothing of what is held.
        moved: bool,
    },
    /// An attempt failed; the next comes after a wait.
    Failed {
        /// Masked.
        address: String,
        /// Why.
        error: BrokerError,
        /// Until the next attempt.
        wait: std::time::Duration,
        /// Which attempt comes next.
        attempt: u32,
        /// How many there may be; none: no bound.
        most: Option<u32>,
    },
    /// The connection was lost; connecting again begins at once.
    Lost(BrokerError),
    /// No further attempt will be made, for this reason.
    GaveUp(BrokerError, Why),
    /// From the broker.
    Broker(Event),
}

/// See the module.
pub(super) struct Link {
    failover: Failover,
    last_index: Option<usize>,
    state: State,
    consume: Consume,
    wanted: Vec<Wanted>,
    held: HashSet<Tag>,
    outbox: VecDeque<Command>,
    /// What was settled, by [`Settlement`].
    settled: [u64; 4],
}

impl Link {
    /// A link that will connect at the first [`Link::next`].
    pub(super) fn new(failover: Failover, consume: Consume) -> Self {
        Self {
            failover,
            last_index: None,
            state: State::Waiting(Instant::now()),
            consume,
            wanted: Vec::new(),
            held: HashSet::new(),
            outbox: VecDeque::new(),
            settled: [0; 4],
        }
    }

    /// Whether a session is up.
    pub(super) fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// The broker in use, or to be tried next.
    pub(super) fn broker(&self) -> &dyn Broker {
        self.failover.current().as_ref()
    }

    /// The queues that are consumed.
    pub(super) fn queues(&self) -> &[crate::broker::topology::Queue] {
        &self.consume.queues
    }

    /// Deliveries of which the broker has not been told.
    pub(super) fn unsettled(&self) -> usize {
        self.held.len()
    }

    /// How often the broker was told what, by [`Settlement`].
    pub(super) fn settled(&self) -> [u64; 4] {
        self.settled
    }

    /// Queues that the broker has not agreed to yet.
    pub(super) fn wanted(&self) -> impl Iterator<Item = &str> {
        self.wanted.iter().map(|wanted| wanted.queue.name.as_str())
    }

    /// Whether the broker still owes us this delivery.
    pub(super) fn holds(&self, tag: Tag) -> bool {
        self.held.contains(&tag)
    }

    /// Tells the broker of a delivery; once. A delivery that the broker has taken back is skipped.
    pub(super) fn settle(&mut self, (tag, settlement): (Tag, Settlement)) {
        if !self.held.remove(&tag) {
            tracing::debug!(target: "celery.worker", tag, ?settlement, "The broker has taken this delivery back; not settled.");
            return;
        }
        self.settled[settlement as usize] += 1;
        match self.outbox.back_mut() {
            Some(Command::Settle(batch)) => batch.push((tag, settlement)),
            _ => self.outbox.push_back(Command::Settle(vec![(tag, settlement)])),
        }
    }

    /// Consumes one more queue. Should the connection be lost before the broker has answered, the answer is that; who
    /// asked may ask again.
    pub(super) fn consume(&mut self, queue: Queue, answer: oneshot::Sender<Consuming>) {
        let (told, heard) = oneshot::channel();
        self.outbox.push_back(Command::Consume(Box::new(queue.clone()), told));
        self.wanted.push(Wanted { queue, heard, answer });
    }

    /// The broker has answered one of those who want a queue.
    fn agreed(consume: &mut Consume, wanted: Wanted, outcome: Consuming) {
        if outcome.is_ok() {
            consume.queues.retain(|known| known.name != wanted.queue.name);
            consume.queues.push(wanted.queue);
        }
        // Nobody may be left to hear it.
        let _ = wanted.answer.send(outcome);
    }

    /// Sends a command, now or when the link is up.
    pub(super) fn send(&mut self, command: Command) {
        match &command {
            Command::Prefetch(count) => self.consume.prefetch = *count,
            Command::Cancel(name) => self.consume.queues.retain(|queue| queue.name != *name),
            Command::Pause => self.consume.paused = true,
            Command::Resume => self.consume.paused = false,
            _ => {}
        }
        // A session that is not up yet is told these by `Consume`.
        let told_anyway =
            matches!(command, Command::Prefetch(_) | Command::Cancel(_) | Command::Pause | Command::Resume);
        if self.is_up() || !told_anyway {
            self.outbox.push_back(command);
        }
    }

    /// Hands over what was sent, as far as the session takes it without waiting.
    pub(super) fn flush(&mut self) {
        let State::Up(session) = &self.state else { return };
        while let Some(command) = self.outbox.pop_front() {
            match session.commands.try_send(command) {
                Ok(()) => {}
                Err(TrySendError::Full(command) | TrySendError::Closed(command)) => {
                    self.outbox.push_front(command);
                    break;
                }
            }
        }
    }

    /// The next event.
    ///
    /// # Cancel safety
    /// May be dropped at any await: an attempt to connect is kept and goes on.
    pub(super) async fn next(&mut self) -> LinkEvent {
        loop {
            match &mut self.state {
                State::Waiting(until) => {
                    tokio::time::sleep_until(*until).await;
                    let broker = self.failover.current().clone();
                    let mut consume = self.consume.clone();
                    if self.last_index == Some(self.failover.index()) {
                        consume.held = self.held.iter().copied().chain(self.unsent()).collect();
                    }
                    self.state = State::Connecting(Box::pin(async move { broker.connect(&consume).await }));
                }
                State::Connecting(connecting) => match connecting.as_mut().await {
                    Ok(session) => return self.up(session),
                    Err(error) => return self.failed(error),
                },
                State::Up(session) => {
                    let blocked = !self.outbox.is_empty();
                    let answered = !self.wanted.is_empty();
                    let answers = async {
                        // Not polled without any; an empty list would be a panic.
                        let (outcome, index, _) =
                            select_all(self.wanted.iter_mut().map(|wanted| &mut wanted.heard)).await;
                        (outcome, index)
                    };
                    let event = tokio::select! {
                        (outcome, index) = answers, if answered => {
                            let wanted = self.wanted.swap_remove(index);
                            let address = self.failover.current().address();
                            let outcome = outcome.unwrap_or_else(|_| Err(unanswered(address)));
                            Self::agreed(&mut self.consume, wanted, outcome);
                            continue;
                        }
                        event = session.events.recv() => event,
                        _ = async { session.commands.reserve().await.is_ok() }, if blocked => {
                            self.flush();
                            continue;
                        }
                    };
                    match event {
                        Some(Event::Lost(error)) => return self.lost(error),
                        Some(event) => {
                            self.note(&event);
                            return LinkEvent::Broker(event);
                        }
                        None => {
                            let reason = "the session ended without a word".to_owned();
                            let address = self.broker().address();
                            return self.lost(BrokerError::Connection { address, reason });
                        }
                    }
                }
                State::Over => pending::<()>().await,
            }
        }
    }

    /// Settled deliveries of which the broker has not been told: for it they are still held.
    fn unsent(&self) -> impl Iterator<Item = Tag> {
        self.outbox
            .iter()
            .filter_map(|command| if let Command::Settle(batch) = command { Some(batch) } else { None })
            .flatten()
            .map(|(tag, _)| *tag)
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Deliveries(deliveries) => {
                self.held.extend(deliveries.iter().map(|delivery| delivery.handle.tag()));
            }
            Event::Forgotten(tags) => {
                for tag in tags {
                    self.held.remove(tag);
                }
            }
            Event::Control(_)
            | Event::Heard(_)
            | Event::Remembered(_)
            | Event::Renewed(_)
            | Event::Lost(_) => {}
        }
    }

    fn up(&mut self, session: Session) -> LinkEvent {
        self.state = State::Up(Box::new(session));
        self.failover.connected();
        let index = self.failover.index();
        let moved = self.last_index.replace(index).is_some_and(|last| last != index);
        if moved {
            self.forget();
        }
        if self.consume.paused {
            // Not every broker is told by `Consume`.
            self.outbox.push_front(Command::Pause);
        }
        LinkEvent::Up { address: self.broker().address(), moved }
    }

    /// What the next session knows nothing of. Publications, and what is to be remembered, are for whatever broker comes.
    fn forget(&mut self) {
        self.held.clear();
        self.outbox.retain(|command| matches!(command, Command::Publish(..) | Command::Remember(_)));
    }

    fn lost(&mut self, error: BrokerError) -> LinkEvent {
        self.outbox.retain(|command| {
            !matches!(command, Command::Consume(..) | Command::Listen(_) | Command::Deafen(_))
        });
        for mut wanted in std::mem::take(&mut self.wanted) {
            // The broker's last word may not have been read yet.
            let outcome = wanted.heard.try_recv().unwrap_or_else(|_| Err(error.clone()));
            Self::agreed(&mut self.consume, wanted, outcome);
        }
        if !self.broker().capabilities().settles_across_sessions {
            self.forget();
        }
        let next = if error.is_retryable() {
            self.failover.lost(Instant::now())
        } else {
            Next::GiveUp(Why::Refused)
        };
        match next {
            Next::Retry { wait, .. } => {
                self.state = State::Waiting(Instant::now() + wait);
                LinkEvent::Lost(error)
            }
            Next::GiveUp(why) => self.give_up(error, why),
        }
    }

    fn failed(&mut self, error: BrokerError) -> LinkEvent {
        let address = self.broker().address();
        match self.failover.failed(&error) {
            Next::Retry { wait, attempt, max, .. } => {
                self.state = State::Waiting(Instant::now() + wait);
                LinkEvent::Failed { address, error, wait, attempt, most: max }
            }
            Next::GiveUp(why) => self.give_up(error, why),
        }
    }

    fn give_up(&mut self, error: BrokerError, why: Why) -> LinkEvent {
        self.state = State::Over;
        LinkEvent::GaveUp(error, why)
    }

    /// Ends the session in order, until the deadline: everything sent is carried out, what is held goes back.
    ///
    /// A connection that is down is waited for while the broker has something to be told: finished work would run again.
    pub(super) async fn close(&mut self, deadline: Instant) {
        let owed =
            |link: &Self| !link.outbox.is_empty() && !link.is_up() && !matches!(link.state, State::Over);
        while owed(self) {
            match tokio::time::timeout_at(deadline, self.next()).await {
                Ok(LinkEvent::Broker(Event::Deliveries(deliveries))) => abandon(deliveries),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let State::Up(mut session) = std::mem::replace(&mut self.state, State::Over) else { return };
        let finish = async {
            for command in self.outbox.drain(..) {
                if session.commands.send(command).await.is_err() {
                    return;
                }
            }
            let (done, answer) = tokio::sync::oneshot::channel();
            if session.commands.send(Command::Close(done)).await.is_err() {
                return;
            }
            let drain = async {
                // Deliveries that were on their way go back with the session.
                while let Some(event) = session.events.recv().await {
                    if let Event::Deliveries(deliveries) = event {
                        abandon(deliveries);
                    }
                }
                pending::<()>().await;
            };
            tokio::select! {
                _ = answer => {}
                () = drain => {}
            }
        };
        if tokio::time::timeout_at(deadline, finish).await.is_err() {
            tracing::warn!(target: "celery.worker", "The broker did not answer in time; its connection is dropped.");
        }
    }
}

/// The answer of a broker that gave none.
fn unanswered(address: String) -> BrokerError {
    BrokerError::Connection {
        address,
        reason: "the connection was closed before the broker answered".to_owned(),
    }
}

/// Leaves deliveries to the broker.
fn abandon(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        delivery.handle.abandon();
    }
}

#[cfg(test)]
#[cfg(test)]
mod tests;
