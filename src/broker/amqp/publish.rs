//! Publishing with confirms, on a connection of its own: RabbitMQ stops reading from a connection that
//! publishes while it is short of memory or disk, and acknowledgements must not wait behind that.

use std::collections::HashSet;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, Connection};
use tokio::sync::{mpsc, oneshot};

use super::address::Address;
use super::connect::open;
use super::fault::{Fault, short};
use super::{message, topology};
use crate::broker::Publication;
use crate::error::BrokerError;

/// Who waits for the broker's confirmation.
pub(crate) type Answer = oneshot::Sender<Result<(), BrokerError>>;

/// Publications that may wait for a connection that the broker blocks; further ones fail at once.
pub(crate) const PUBLISH_CAPACITY: usize = 4096;

type Confirming = Pin<Box<dyn Future<Output = Result<(), Fault>> + Send>>;

/// Publishes what comes until the sender is dropped and all is answered.
pub(crate) struct Publisher {
    address: Address,
    name: String,
    requests: mpsc::Receiver<(Box<Publication>, Answer)>,
    link: Option<Link>,
}

/// A live connection with its channel in confirm mode.
struct Link {
    connection: Connection,
    channel: Channel,
    /// Exchanges that were declared on this connection.
    declared: HashSet<String>,
}

impl Publisher {
    /// A publisher that connects when it is first needed. `name` is shown among the broker's connections.
    pub(crate) fn new(
        address: Address,
        name: String,
        requests: mpsc::Receiver<(Box<Publication>, Answer)>,
    ) -> Self {
        Self { address, name, requests, link: None }
    }

    /// The loop. Confirmations are awaited side by side, so that one slow queue does not hold up the others.
    pub(crate) async fn run(mut self) {
        let mut pending = FuturesUnordered::new();
        loop {
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some((publication, answer)) => {
                        match self.send(&publication).await {
                            Ok(confirming) => {
                                let address = self.address.clone();
                                pending.push(async move {
                                    let outcome = confirming.await.map_err(|fault| fault.starting(&address));
                                    // Nobody waits any more: the worker is stopping.
                                    let _ = answer.send(outcome);
                                });
                            }
                            Err(fault) => {
                                let _ = answer.send(Err(fault.starting(&self.address)));
                            }
                        }
                    }
                    None => break,
                },
                Some(()) = pending.next() => {}
            }
        }
        while pending.next().await.is_some() {}
        if let Some(link) = self.link.take() {
            // The broker may be gone; whatever it says, the connection ends with its owner.
            let _ = link.connection.close(200, "OK".into()).await;
        }
    }

    /// Hands a message to the connection; the future ends when the broker has confirmed it.
    async fn send(&mut self, publication: &Publication) -> Result<Confirming, Fault> {
        let (exchange, key) = (short(&publication.exchange)?, short(&publication.routing_key)?);
        let properties = message::to_send(&publication.message)?;
        let link = self.link().await?;
        if let Some(kind) = &publication.exchange_type
            && !link.declared.contains(&publication.exchange)
        {
            let exchange = topology::exchange(&publication.exchange, kind);
            topology::declare_exchange(&link.channel, &exchange).await?;
            link.declared.insert(publication.exchange.clone());
        }
        let (channel, body) = (link.channel.clone(), publication.message.body.clone());
        let mut confirming: Confirming = Box::pin(async move {
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
        });
        // The first poll hands the frames over: messages leave in the order in which they came.
        match poll_fn(|context| Poll::Ready(confirming.as_mut().poll(context))).await {
            Poll::Ready(outcome) => Ok(Box::pin(std::future::ready(outcome))),
            Poll::Pending => Ok(confirming),
        }
    }

    /// The connection, made where there is none. A channel that the broker closed (an unknown exchange) is
    /// replaced: one bad message fails alone.
    async fn link(&mut self) -> Result<&mut Link, Fault> {
        match &mut self.link {
            Some(link) if link.channel.status().connected() => {}
            Some(link) if link.connection.status().connected() => {
                link.channel = confirming(&link.connection).await?;
                link.declared.clear();
            }
            _ => {
                let connection = open(&self.address, &self.name).await?;
                let channel = confirming(&connection).await?;
                self.link = Some(Link { connection, channel, declared: HashSet::new() });
            }
        }
        self.link.as_mut().ok_or(Fault::Silent("connection.open"))
    }
}

async fn confirming(connection: &Connection) -> Result<Channel, Fault> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}
