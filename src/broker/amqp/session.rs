//! One live connection: the task that owns it, from the first delivery to the last settlement.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use lapin::options::{BasicAckOptions, BasicRejectOptions};
use lapin::{Channel, Consumer};
use tokio::sync::{mpsc, oneshot};

use super::address::Address;
use super::connect::Link;
use super::consumers::{Consumers, Heard, Origin};
use super::fault::Fault;
use super::publish::Answer;
use super::settle::{Frame, Ledger};
use super::sides::{Overheard, Sides};
use super::{message, topology};
use crate::broker::topology::Queue;
use crate::broker::{self, Command, Delivery, Event, Handle, Publication, Settlement, Tag};
use crate::error::BrokerError;
use crate::protocol::DeliveryInfo;

/// Longest wait for the broker's answer to one request of a running session. RabbitMQ may take its time to
/// declare a queue in a cluster; one that takes longer is taken for dead.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Longest time that closing may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Commands taken at once: acknowledgements that come together leave together.
const COMMAND_BATCH: usize = 256;
/// The low bits of a tag are the broker's number of the delivery, the others the session's: 10^12 deliveries
/// in a session, 16 million sessions.
const DELIVERY_BITS: u32 = 40;

type Sending = Pin<Box<dyn Future<Output = lapin::Result<()>> + Send>>;

/// Everything that belongs to one connection.
pub(super) struct Live {
    pub(super) address: Address,
    /// Number of the session, unique for the broker object.
    pub(super) number: u64,
    pub(super) link: Link,
    /// The channel of the task consumers.
    pub(super) channel: Channel,
    pub(super) consumers: Consumers,
    /// The channel of remote control, and its consumer.
    pub(super) control: Option<(Channel, Consumer)>,
    /// What is only listened to.
    pub(super) sides: Sides,
    pub(super) publisher: mpsc::Sender<(Box<Publication>, Answer)>,
    /// Answered when the publisher has ended, once its sender is dropped.
    pub(super) published: oneshot::Receiver<()>,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) commands: mpsc::Receiver<Command>,
}

/// How a session ended.
enum End {
    /// The worker closed it, or dropped it.
    Closed(Option<oneshot::Sender<()>>),
    Lost(BrokerError),
}

/// Runs the session to its end.
pub(super) async fn run(live: Live) {
    let mut broken = Box::pin(live.link.connection.events_listener());
    let state = State { ledger: Ledger::default(), sending: FuturesUnordered::new(), paused: false, live };
    state.run(&mut broken).await;
}

/// What wakes a session.
enum Woken {
    Commands(usize),
    Heard(Heard),
    Control(Option<lapin::Result<lapin::message::Delivery>>),
    Side(Overheard),
    Sent(lapin::Result<()>),
    Connection(Option<lapin::Event>),
}

struct State {
    live: Live,
    ledger: Ledger,
    /// Settlements that wait for the socket.
    sending: FuturesUnordered<Sending>,
    paused: bool,
}

impl State {
    async fn run(mut self, broken: &mut (impl Stream<Item = lapin::Event> + Unpin)) {
        match self.serve(broken).await {
            End::Closed(answer) => {
                // Whatever the broker says or does not say, the worker gets its answer in time.
                let _ = tokio::time::timeout(CLOSE_WITHIN, self.close()).await;
                if let Some(answer) = answer {
                    let _ = answer.send(());
                }
            }
            End::Lost(error) => {
                let _ = self.live.events.send(Event::Lost(error)).await;
            }
        }
    }

    async fn serve(&mut self, broken: &mut (impl Stream<Item = lapin::Event> + Unpin)) -> End {
        // What happened before there was a listener has not been heard.
        if !self.live.link.connection.status().connected() {
            return self.lost("the connection was closed");
        }
        let mut batch = Vec::new();
        loop {
            let live = &mut self.live;
            // No bias: neither commands nor deliveries may starve the other.
            let woken = tokio::select! {
                count = live.commands.recv_many(&mut batch, COMMAND_BATCH) => Woken::Commands(count),
                heard = async {
                    // Room first: what is taken from the consumers must be handed over at once. We are the
                    // only sender, so that the room is still there when the permit is dropped.
                    match live.events.reserve().await {
                        Ok(_) => live.consumers.next().await,
                        Err(_) => Heard::Nobody,
                    }
                } => Woken::Heard(heard),
                heard = async {
                    match live.events.reserve().await {
                        Ok(_) => control(&mut live.control).await,
                        Err(_) => None,
                    }
                } => Woken::Control(heard),
                heard = async {
                    match live.events.reserve().await {
                        Ok(_) => live.sides.next().await,
                        Err(_) => std::future::pending().await,
                    }
                } => Woken::Side(heard),
                Some(sent) = self.sending.next() => Woken::Sent(sent),
                event = broken.next() => Woken::Connection(event),
            };
            let outcome = match woken {
                Woken::Commands(0) => Err(End::Closed(None)),
                Woken::Commands(_) => self.commands(std::mem::take(&mut batch)).await,
                Woken::Heard(heard) => self.heard(heard),
                Woken::Control(heard) => self.control(heard),
                Woken::Side(heard) => self.side(heard),
                Woken::Sent(Ok(())) => Ok(()),
                Woken::Sent(Err(error)) => Err(self.lost(Fault::from(error))),
                Woken::Connection(event) => self.connection(event),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    fn lost(&self, reason: impl ToString) -> End {
        End::Lost(self.live.address.lost(reason))
    }

    fn heard(&mut self, heard: Heard) -> Result<(), End> {
        match heard {
            Heard::Deliveries(deliveries) if self.paused => {
                self.give_back(deliveries);
                Ok(())
            }
            Heard::Deliveries(deliveries) => {
                let deliveries = deliveries.into_iter().map(|(delivery, origin)| self.take(delivery, origin));
                let event = Event::Deliveries(deliveries.collect());
                self.live.events.try_send(event).map_err(|_| End::Closed(None))
            }
            Heard::Failed(fault) => Err(self.lost(fault)),
            Heard::Nobody => Err(End::Closed(None)),
        }
    }

    fn control(&mut self, heard: Option<lapin::Result<lapin::message::Delivery>>) -> Result<(), End> {
        match heard {
            Some(Ok(delivery)) => {
                let message = message::received(&delivery.properties, delivery.data);
                self.live.events.try_send(Event::Control(message)).map_err(|_| End::Closed(None))
            }
            Some(Err(error)) => Err(self.lost(Fault::from(error))),
            None => Err(self.lost("the broker cancelled the consumer of remote control")),
        }
    }

    fn side(&mut self, (queue, heard): Overheard) -> Result<(), End> {
        match heard {
            Some(Ok(delivery)) => {
                let message = message::received(&delivery.properties, delivery.data);
                let routing_key = delivery.routing_key.to_string();
                let event = Event::Heard(broker::Heard { queue: queue.to_string(), routing_key, message });
                self.live.events.try_send(event).map_err(|_| End::Closed(None))
            }
            Some(Err(error)) => Err(self.lost(Fault::from(error))),
            // Ours to end, or the broker's.
            None if self.live.sides.listens_to(&queue) => {
                Err(self.lost(format!("the broker cancelled the consumer of {queue}")))
            }
            None => Ok(()),
        }
    }

    fn connection(&mut self, event: Option<lapin::Event>) -> Result<(), End> {
        match event {
            // Of one channel: ours, or the scratch channel of a refused declaration.
            Some(lapin::Event::Error(error)) if error.is_amqp_soft_error() && self.channels_are_open() => {
                Ok(())
            }
            Some(lapin::Event::Error(error)) => Err(self.lost(Fault::from(error))),
            Some(lapin::Event::ConnectionBlocked(reason)) => {
                tracing::warn!(
                    target: "celery.worker.consumer",
                    reason,
                    "The broker is short of resources and blocks this connection."
                );
                Ok(())
            }
            Some(_) => Ok(()),
            None => Err(self.lost("the connection was closed")),
        }
    }

    fn channels_are_open(&self) -> bool {
        let control = self.live.control.as_ref().is_none_or(|(channel, _)| channel.status().connected());
        control && self.live.sides.is_open() && self.live.channel.status().connected()
    }

    fn take(&mut self, delivery: lapin::message::Delivery, origin: Origin) -> Delivery {
        let queue = self.live.consumers.queue(origin);
        if !queue.no_ack {
            self.ledger.delivered(delivery.delivery_tag, origin);
        }
        let number = self.live.number;
        Delivery {
            message: message::received(&delivery.properties, delivery.data),
            info: DeliveryInfo {
                exchange: delivery.exchange.to_string(),
                routing_key: delivery.routing_key.to_string(),
                redelivered: delivery.redelivered,
                queue: queue.name.clone(),
            },
            handle: Handle::new(tag(number, delivery.delivery_tag)),
        }
    }

    async fn commands(&mut self, commands: Vec<Command>) -> Result<(), End> {
        let mut settlements: Vec<(Tag, Settlement)> = Vec::new();
        let last = commands.iter().rposition(|command| matches!(command, Command::Prefetch(_)));
        for (index, command) in commands.into_iter().enumerate() {
            match command {
                // Only the last one counts: a request each would be a round trip each.
                Command::Prefetch(_) if Some(index) != last => {}
                Command::Settle(batch) if settlements.is_empty() => settlements = batch,
                Command::Settle(batch) => settlements.extend(batch),
                other => {
                    self.settle(std::mem::take(&mut settlements));
                    self.command(other).await?;
                }
            }
        }
        self.settle(settlements);
        if !self.paused && self.live.consumers.misfit() {
            self.ask("basic.consume", async |live| live.consumers.fit().await).await?;
        }
        Ok(())
    }

    async fn command(&mut self, command: Command) -> Result<(), End> {
        let live = &mut self.live;
        match command {
            Command::Settle(batch) => self.settle(batch),
            Command::Prefetch(_) if self.paused => {}
            Command::Prefetch(count) => {
                self.ask("basic.qos", async |live| live.consumers.limit(count).await).await?;
            }
            Command::Consume(..) if self.paused => {}
            Command::Consume(queue, answer) => {
                let outcome = self.consume(*queue).await?;
                // Nobody may be left to hear it.
                let _ = answer.send(outcome.map_err(|fault| self.live.address.refused(fault)));
            }
            Command::Cancel(queue) => {
                self.ask("basic.cancel", async |live| live.consumers.cancel(&queue).await).await?;
            }
            Command::Pause => {
                self.paused = true;
                self.ask("basic.cancel", async |live| live.consumers.cancel_all().await).await?;
            }
            Command::Listen(queue) => {
                let name = queue.name.clone();
                if let Err(fault) = self.hark(*queue).await? {
                    tracing::error!(target: "celery.worker.consumer", queue = name, %fault, "The broker does not let us listen.");
                }
            }
            Command::Deafen(queue) => {
                self.ask("basic.cancel", async |live| live.sides.deafen(&queue).await).await?;
            }
            Command::Publish(publication, answer) => {
                if let Err(error) = live.publisher.try_send((publication, answer)) {
                    let (_, answer) = error.into_inner();
                    let _ = answer.send(Err(live.address.lost("too many messages wait to be published")));
                }
            }
            Command::Park { .. } | Command::Unpark(_) | Command::Resume => tracing::error!(
                target: "celery.worker.consumer",
                "AMQP cannot park deliveries: a bug of celeriac. The delivery stays prefetched."
            ),
            Command::Remember(_) => tracing::error!(
                target: "celery.worker.consumer",
                "AMQP cannot remember what is revoked: a bug of celeriac. It is forgotten with the last worker."
            ),
            Command::Close(answer) => return Err(End::Closed(Some(answer))),
        }
        Ok(())
    }

    /// Declares a queue and listens to it. The inner error is the broker's refusal.
    async fn hark(&mut self, queue: Queue) -> Result<Result<(), Fault>, End> {
        if let Err(refusal) = self.declare(&queue).await? {
            return Ok(Err(refusal));
        }
        self.ask("basic.consume", async |live| live.sides.hark(&live.link, &queue.name).await).await.map(Ok)
    }

    /// Declares a queue and consumes it. The inner error is the broker's refusal.
    async fn consume(&mut self, queue: Queue) -> Result<Result<(), Fault>, End> {
        if let Err(refusal) = self.declare(&queue).await? {
            return Ok(Err(refusal));
        }
        self.ask("basic.consume", async |live| live.consumers.add(queue).await).await.map(Ok)
    }

    /// Declares a queue on a channel of its own, where a refusal does no harm. The inner error is the broker's
    /// refusal.
    async fn declare(&mut self, queue: &Queue) -> Result<Result<(), Fault>, End> {
        let mut refusal = None;
        self.ask("queue.declare", async |live| {
            let scratch = live.link.channel().await?;
            match topology::require(&scratch, queue).await {
                Err(fault) if fault.is_refusal() => refusal = Some(fault),
                outcome => {
                    outcome?;
                    scratch.close(200, "OK".into()).await?;
                }
            }
            Ok(())
        })
        .await?;
        Ok(refusal.map_or(Ok(()), Err))
    }

    /// Asks the broker; a broker that refuses or is silent ends the session.
    async fn ask(
        &mut self,
        what: &'static str,
        request: impl AsyncFnOnce(&mut Live) -> Result<(), Fault>,
    ) -> Result<(), End> {
        let answer = tokio::time::timeout(ANSWER_WITHIN, request(&mut self.live)).await;
        answer.unwrap_or(Err(Fault::Silent(what))).map_err(|fault| End::Lost(self.live.address.lost(fault)))
    }

    fn settle(&mut self, batch: Vec<(Tag, Settlement)>) {
        if batch.is_empty() {
            return;
        }
        let number = self.live.number;
        let ours = batch.into_iter().filter_map(|(tag, settlement)| match delivery_tag(number, tag) {
            Some(tag) => Some((tag, settlement)),
            None => {
                tracing::debug!(
                    target: "celery.worker.consumer",
                    tag,
                    "A delivery of an earlier connection is not settled: the broker has requeued it."
                );
                None
            }
        });
        let consumers = &mut self.live.consumers;
        for frame in self.ledger.settle(ours, |origin| consumers.settled(origin)) {
            self.send(frame);
        }
    }

    /// Puts deliveries that came after [`Command::Pause`] back.
    fn give_back(&mut self, deliveries: Vec<(lapin::message::Delivery, Origin)>) {
        for (delivery, origin) in deliveries {
            if !self.live.consumers.queue(origin).no_ack {
                self.send(Frame::Reject { tag: delivery.delivery_tag, requeue: true });
            }
        }
    }

    fn send(&mut self, frame: Frame) {
        let channel = self.live.channel.clone();
        let mut sending: Sending = match frame {
            Frame::Ack { tag, multiple } => {
                Box::pin(async move { channel.basic_ack(tag, BasicAckOptions { multiple }).await })
            }
            Frame::Reject { tag, requeue } => {
                Box::pin(async move { channel.basic_reject(tag, BasicRejectOptions { requeue }).await })
            }
        };
        // The first poll puts the frame into the connection's queue, so that frames leave in order.
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match sending.as_mut().poll(&mut context) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => self.sending.push(Box::pin(std::future::ready(Err(error)))),
            Poll::Pending => self.sending.push(sending),
        }
    }

    /// Takes leave in order: nothing new, all settlements and publications out, then the connection. The broker
    /// requeues what is still unsettled when the connection closes.
    async fn close(mut self) {
        let outcome: Result<(), Fault> = async {
            self.live.consumers.cancel_all().await?;
            while let Some(sent) = self.sending.next().await {
                sent?;
            }
            drop(self.live.publisher);
            // An error: the publisher has ended before.
            let _ = self.live.published.await;
            Ok(self.live.link.connection.close(200, "OK".into()).await?)
        }
        .await;
        if let Err(fault) = outcome {
            tracing::debug!(target: "celery.worker.consumer", %fault, "The connection did not close in order.");
        }
    }
}

/// The next message of remote control; never ready where it is off.
async fn control(
    control: &mut Option<(Channel, Consumer)>,
) -> Option<lapin::Result<lapin::message::Delivery>> {
    match control {
        Some((_, consumer)) => consumer.next().await,
        None => std::future::pending().await,
    }
}

fn tag(session: u64, delivery: u64) -> Tag {
    (session << DELIVERY_BITS) | (delivery & ((1 << DELIVERY_BITS) - 1))
}

/// The broker's number of a delivery of this session.
fn delivery_tag(session: u64, tag: Tag) -> Option<u64> {
    let number = tag & ((1 << DELIVERY_BITS) - 1);
    (tag == self::tag(session, number)).then_some(number)
}
