//! Publishing with confirms, on a connection of its own: RabbitMQ stops reading from a connection that
//! publishes while it is short of memory or disk, and acknowledgements must not wait behind that.

use std::collections::{HashSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{BoxStream, FuturesUnordered};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::address::Address;
use super::connect::Link;
use super::fault::{Fault, short};
use super::{message, topology};
use crate::broker::Publication;
use crate::error::{BrokerError, back_off};

/// Who waits for the broker's confirmation.
pub(crate) type Answer = oneshot::Sender<Result<(), BrokerError>>;

/// Publications that may wait for a connection that the broker blocks; further ones fail at once.
pub(crate) const PUBLISH_CAPACITY: usize = 4096;

/// Waits after failed attempts to connect.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

type Sending = Pin<Box<dyn Future<Output = Result<(), Fault>> + Send>>;
type Request = (Box<Publication>, Answer);
type Pending = Pin<Box<dyn Future<Output = Done> + Send>>;

/// How publishing ended.
struct Done {
    request: Request,
    outcome: Result<(), Failure>,
}

struct Failure {
    /// The broker closed the channel over this message or over another one.
    refusal: bool,
    error: BrokerError,
}

impl Failure {
    fn of(fault: Fault, address: Option<&Address>) -> Self {
        let refusal = fault.is_refusal() || fault.is_late();
        let error = match address {
            Some(address) => fault.starting(address),
            None => BrokerError::Connection { address: String::new(), reason: fault.to_string() },
        };
        Self { refusal, error }
    }
}

impl Done {
    fn answer(self) {
        // Nobody waits any more: the worker is stopping.
        let _ = self.request.1.send(self.outcome.map_err(|failure| failure.error));
    }
}

/// Publishes what comes until the sender is dropped and all is answered.
pub(crate) struct Publisher {
    /// The failover list; the first is the one in use.
    addresses: VecDeque<Address>,
    name: String,
    requests: mpsc::Receiver<Request>,
    line: Option<Line>,
    /// Attempts to connect that have failed in a row.
    failures: u32,
    /// No attempt before this time: what comes until then fails at once, for this reason.
    pause: Option<(Instant, BrokerError)>,
}

/// A live connection with its channel in confirm mode.
struct Line {
    link: Link,
    channel: Channel,
    /// Exchanges, and queues with the word before them, that were declared on this connection.
    declared: HashSet<String>,
    /// What the connection says of itself.
    events: BoxStream<'static, lapin::Event>,
}

/// The next event of the connection; never ready without one.
async fn blocking(line: &mut Option<Line>) -> Option<lapin::Event> {
    match line {
        Some(line) => line.events.next().await,
        None => std::future::pending().await,
    }
}

impl Publisher {
    /// A publisher that connects when it is first needed. `name` is shown among the broker's connections.
    pub(crate) fn new(addresses: Vec<Address>, name: String, requests: mpsc::Receiver<Request>) -> Self {
        Self { addresses: addresses.into(), name, requests, line: None, failures: 0, pause: None }
    }

    /// The loop. Confirmations are awaited side by side, so that one slow queue does not hold up the others.
    pub(crate) async fn run(mut self) {
        let mut pending: FuturesUnordered<Pending> = FuturesUnordered::new();
        // The broker says which channel it closes, not over which message: all that were on their way are
        // tried again, one at a time.
        let mut suspects: VecDeque<Request> = VecDeque::new();
        let mut open = true;
        while open || !pending.is_empty() || !suspects.is_empty() {
            let clear = suspects.is_empty();
            if pending.is_empty()
                && let Some(suspect) = suspects.pop_front()
            {
                let done = self.send(suspect).await.await;
                done.answer();
                continue;
            }
            tokio::select! {
                request = self.requests.recv(), if open && clear => match request {
                    Some(request) => {
                        let sent = self.send(request).await;
                        pending.push(sent);
                    }
                    None => open = false,
                },
                Some(done) = pending.next() => match done.outcome {
                    Err(Failure { refusal: true, .. }) => suspects.push_back(done.request),
                    _ => done.answer(),
                },
                Some(event) = blocking(&mut self.line) => match event {
                    lapin::Event::ConnectionBlocked(reason) => tracing::warn!(
                        target: "celery.worker.consumer",
                        "The broker is short of resources and takes no messages: {reason}"
                    ),
                    lapin::Event::ConnectionUnblocked => {
                        tracing::info!(target: "celery.worker.consumer", "The broker takes messages again.");
                    }
                    _ => {}
                },
            }
        }
        if let Some(line) = self.line.take() {
            // The broker may be gone; whatever it says, the connection ends with its owner.
            let _ = line.link.connection.close(200, "OK".into()).await;
        }
    }

    /// Hands a message to the connection; the future ends when the broker has confirmed it.
    async fn send(&mut self, request: Request) -> Pending {
        let outcome = match self.connect().await {
            Ok(()) => self.hand_over(&request.0).await.map_err(|fault| self.failure(fault)),
            Err(error) => Err(Failure { refusal: false, error }),
        };
        let mut confirming = match outcome {
            Ok(confirming) => confirming,
            Err(failure) => return Box::pin(std::future::ready(Done { request, outcome: Err(failure) })),
        };
        // The first poll hands the frames over: messages leave in the order in which they came.
        let first = poll_fn(|context| Poll::Ready(confirming.as_mut().poll(context))).await;
        let address = self.addresses.front().cloned();
        Box::pin(async move {
            let outcome = match first {
                Poll::Ready(outcome) => outcome,
                Poll::Pending => confirming.await,
            };
            Done { request, outcome: outcome.map_err(|fault| Failure::of(fault, address.as_ref())) }
        })
    }

    fn failure(&self, fault: Fault) -> Failure {
        Failure::of(fault, self.addresses.front())
    }

    async fn hand_over(&mut self, publication: &Publication) -> Result<Sending, Fault> {
        let (exchange, key) = (short(&publication.exchange)?, short(&publication.routing_key)?);
        let properties = message::to_send(&publication.message)?;
        let Some(line) = &mut self.line else { return Err(Fault::Silent("the connection request")) };
        if !line.channel.status().connected() {
            // A channel that the broker closed (an unknown exchange) is replaced: one bad message fails alone.
            line.channel = confirming(&line.link).await?;
            line.declared.clear();
        }
        if let Some(kind) = &publication.exchange_type
            && !line.declared.contains(&publication.exchange)
        {
            let exchange = topology::exchange(&publication.exchange, kind);
            topology::declare_exchange(&line.channel, &exchange).await?;
            line.declared.insert(publication.exchange.clone());
        }
        if let Some(queue) = &publication.declare {
            let name = format!("queue {}", queue.name);
            if !line.declared.contains(&name) {
                topology::declare(&line.channel, queue).await?;
                line.declared.insert(name);
            }
        }
        let (channel, body) = (line.channel.clone(), publication.message.body.clone());
        Ok(Box::pin(async move {
            let options = BasicPublishOptions::default();
            match channel.basic_publish(exchange, key, options, &body, properties).await?.await? {
                Confirmation::Ack(None) | Confirmation::NotRequested => Ok(()),
                Confirmation::Ack(Some(back)) | Confirmation::Nack(Some(back)) => {
                    Err(Fault::NotTaken(format!("({}) {}", back.reply_code, back.reply_text)))
                }
                Confirmation::Nack(None) => {
                    Err(Fault::NotTaken("the broker could not take the message".to_owned()))
                }
            }
        }))
    }

    /// Sees to a live connection. After a failure the next address is used, and whoever comes before the wait
    /// is over is told at once instead of waiting for one more attempt.
    async fn connect(&mut self) -> Result<(), BrokerError> {
        if self.line.as_ref().is_some_and(|line| line.link.connection.status().connected()) {
            return Ok(());
        }
        self.line = None;
        if let Some((until, error)) = &self.pause
            && Instant::now() < *until
        {
            return Err(error.clone());
        }
        let Some(address) = self.addresses.front() else { return Ok(()) };
        let outcome: Result<Line, Fault> = async {
            let link = Link::open(address, &self.name).await?;
            let channel = confirming(&link).await?;
            let events = link.connection.events_listener().boxed();
            Ok(Line { link, channel, declared: HashSet::new(), events })
        }
        .await;
        match outcome {
            Ok(line) => {
                self.line = Some(line);
                (self.failures, self.pause) = (0, None);
                Ok(())
            }
            Err(fault) => {
                // Also a refused login: results wait until it is mended rather than be thrown away.
                let error = address.lost(fault);
                self.addresses.rotate_left(1);
                self.failures = self.failures.saturating_add(1);
                let wait = back_off(self.failures, FIRST_WAIT, LONGEST_WAIT);
                self.pause = Some((Instant::now() + wait, error.clone()));
                Err(error)
            }
        }
    }
}

async fn confirming(link: &Link) -> Result<Channel, Fault> {
    let channel = link.channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}
