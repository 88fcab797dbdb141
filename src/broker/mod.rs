//! What a broker is. One connection is one [`Session`] with one owner; nothing of a lost session
//! survives into the next but the deliveries that the broker itself still holds for us.
//!
//! The worker asks [`Broker::connect`] for a session, reads [`Event`]s from it and writes [`Command`]s
//! to it. A session that ends drops its event sender: `events.recv()` gives `None` after a last
//! [`Event::Lost`]. Connecting again, back-off and the failover list are in [`reconnect`], once for all.

pub mod amqp;
mod envelope;
pub mod filesystem;
pub mod memory;
pub mod reconnect;
pub mod redis;
pub mod topology;

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::error::BrokerError;
use crate::protocol::{DeliveryInfo, Message};
use topology::Queue;

/// Names a delivery within one worker. Minted by the session; unique for the life of the [`Broker`]
/// object, also across its sessions.
pub type Tag = u64;

/// What a broker can do; the worker asks instead of knowing kinds.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// A delivery taken in one session can be settled in the next (Redis, filesystem). Where false (AMQP)
    /// the broker requeues whatever was unsettled when the connection went, and settling is pointless.
    pub settles_across_sessions: bool,
    /// [`Command::Park`] works: a far `eta` is held by the broker and takes no prefetch.
    pub parks: bool,
    /// Remote control works: the broker can send one message to all workers.
    pub fanout: bool,
    /// [`Command::Remember`] works: what one worker is told survives all of them.
    pub remembers: bool,
    /// [`Command::Listen`] works.
    pub listens: bool,
}

/// A kind of broker at one address. Cheap to clone behind an [`Arc`]; holds no connection.
#[async_trait]
pub trait Broker: Send + Sync {
    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The address, password masked, as `Connected to …` shows it.
    fn address(&self) -> String;

    /// Connects, declares what `consume` names and starts to consume it.
    ///
    /// # Errors
    /// [`BrokerError::is_retryable`] says whether connecting again may help.
    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError>;
}

/// What a session consumes.
#[derive(Clone, Debug)]
pub struct Consume {
    /// Node name, `celery@host`.
    pub node: String,
    /// Queues, in the order of the configuration.
    pub queues: Vec<Queue>,
    /// Most deliveries that may be unsettled at once, parked ones not counted; 0: no bound.
    pub prefetch: u32,
    /// Nothing is fetched before [`Command::Resume`]. Brokers that do not park may ignore it.
    pub paused: bool,
    /// The exchange of remote control (`celery.pidbox`), or none when it is off.
    pub control: Option<Control>,
    /// Tags that the worker still holds of earlier sessions, those included that it will settle in this one; only where
    /// [`Capabilities::settles_across_sessions`]. The new session keeps them alive and counts them.
    pub held: HashSet<Tag>,
}

/// How the queue of remote control is declared.
#[derive(Clone, Debug, Deserialize)]
pub struct Control {
    /// Name of the exchange, `celery` by default: `<name>.pidbox` is declared as fanout.
    pub exchange: String,
    /// Message time-to-live of the queue, seconds.
    pub queue_ttl: Option<f64>,
    /// The queue is deleted when unused for so many seconds.
    pub queue_expires: Option<f64>,
    /// Whether the queue belongs to this connection alone.
    pub queue_exclusive: bool,
    /// Whether the queue survives a restart of the broker.
    pub queue_durable: bool,
    /// `task_serializer`, in which replies are written. Only JSON is written here.
    #[serde(default = "json")]
    pub serializer: String,
}

fn json() -> String {
    "json".to_owned()
}

/// One live connection. Dropping it ends its tasks at once.
pub struct Session {
    /// What the broker tells us.
    pub events: mpsc::Receiver<Event>,
    /// What we tell the broker. Commands are carried out in order.
    pub commands: mpsc::Sender<Command>,
    /// The session's tasks; aborted on drop.
    pub tasks: JoinSet<()>,
}

/// Events that may wait: enough for a burst of claims, small enough that memory is bounded by prefetch.
pub const EVENT_CAPACITY: usize = 64;
/// Commands that may wait; each may carry a batch.
pub const COMMAND_CAPACITY: usize = 1024;

/// What the broker tells the worker.
#[derive(Debug)]
pub enum Event {
    /// Messages, never an empty list, in the order in which they are to be run.
    Deliveries(Vec<Delivery>),
    /// A remote control message: its JSON body and headers.
    Control(Message),
    /// A message of a queue that [`Command::Listen`] named. It is settled already.
    Heard(Heard),
    /// What [`Command::Remember`] left with the broker, in the order in which it is to be forgotten; never empty.
    /// Comes before the first deliveries of a session.
    Remembered(Vec<String>),
    /// The broker no longer knows these tags (their lease was lost): their outcome must not be settled.
    Forgotten(Vec<Tag>),
    /// So many of the messages that are held were renewed; never 0.
    Renewed(usize),
    /// The connection is gone; nothing follows.
    Lost(BrokerError),
}

/// What the worker tells the broker.
#[derive(Debug)]
pub enum Command {
    /// Settles deliveries, in this order. A tag that is not held is ignored.
    Settle(Vec<(Tag, Settlement)>),
    /// Holds a delivery until `due` (seconds since the epoch) without counting it as prefetched.
    /// The session drops its copy; the message is safe in the broker.
    Park {
        /// Which delivery.
        tag: Tag,
        /// When it is to run.
        due: f64,
    },
    /// Fetches parked deliveries again; they come as [`Event::Deliveries`] under the same tags, or as
    /// [`Event::Forgotten`] when somebody else took them.
    Unpark(Vec<Tag>),
    /// Changes how many deliveries may be unsettled.
    Prefetch(u32),
    /// Consumes one more queue, declaring it first; the answer comes when the broker has agreed or refused. A
    /// refusal leaves the session as it was.
    Consume(Box<Queue>, oneshot::Sender<Result<(), BrokerError>>),
    /// Stops consuming a queue.
    Cancel(String),
    /// Stops fetching from all queues at once; settling, publishing and control go on.
    Pause,
    /// Fetches again; only where [`Capabilities::parks`].
    Resume,
    /// Keeps texts for the workers to come; only where [`Capabilities::remembers`].
    Remember(Remembrance),
    /// Declares a queue and listens to it without acknowledgements, whatever is held or paused; only where
    /// [`Capabilities::listens`]. A refusal is logged and nothing is heard. It ends with the session.
    Listen(Box<Queue>),
    /// Deletes a queue that was listened to.
    Deafen(String),
    /// Publishes a message; the answer comes when the broker has it (confirms on AMQP).
    Publish(Box<Publication>, oneshot::Sender<Result<(), BrokerError>>),
    /// Carries out everything before this, gives back what is still held, closes the connection and answers. On AMQP
    /// closing the channel requeues.
    Close(oneshot::Sender<()>),
}

/// A message that was listened to.
#[derive(Debug)]
pub struct Heard {
    /// The queue.
    pub queue: String,
    /// The routing key that it was published with.
    pub routing_key: String,
    /// The message.
    pub message: Message,
}

/// Texts that the broker keeps for the workers to come, of this or any later time.
#[derive(Clone, Debug, PartialEq)]
pub struct Remembrance {
    /// Each text and for how many seconds from now; infinity: for ever. Said again it lasts longer, never shorter.
    pub entries: Vec<(String, f64)>,
    /// Most that are kept, those that end first go first; 0: no bound.
    pub most: usize,
}

/// What the broker is told of one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settlement {
    /// Done with.
    Ack,
    /// Not wanted: dropped, or dead-lettered where the queue says so.
    Reject,
    /// Rejected with requeue: to the tail of the line on Redis (as kombu), as the broker decides on AMQP.
    Requeue,
    /// Never started: back to the head of its queue, marked redelivered.
    GiveBack,
}

/// A message to publish.
#[derive(Clone, Debug)]
pub struct Publication {
    /// `""` for the default exchange.
    pub exchange: String,
    /// Its type where it has to be declared first: `direct`, `topic`, `fanout`; `None`: do not declare.
    pub exchange_type: Option<String>,
    /// Routing key; the queue's name on the default exchange.
    pub routing_key: String,
    /// What to publish. `delivery_mode`, `priority`, `expiration`, `reply_to` and `correlation_id` are read
    /// from the properties.
    pub message: Message,
    /// The queue that it is for, where nobody may have declared it yet: declared first, once a connection.
    pub declare: Option<Arc<Queue>>,
}

/// A message with the handle that settles it, once.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// Where it came from.
    pub info: DeliveryInfo,
    /// Settles it.
    pub handle: Handle,
}

/// The right to settle one delivery, once. Dropped unsettled it logs a bug and leaves the message to the
/// broker, which redelivers it; it is never silently acknowledged.
#[derive(Debug)]
pub struct Handle {
    tag: Tag,
    open: bool,
}

impl Handle {
    /// A handle for the delivery of this name.
    pub fn new(tag: Tag) -> Self {
        Self { tag, open: true }
    }

    /// The tag, for bookkeeping. Settling goes through [`Handle::settle`].
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// Uses the handle up: the pair to put into [`Command::Settle`].
    pub fn settle(mut self, settlement: Settlement) -> (Tag, Settlement) {
        self.open = false;
        (self.tag, settlement)
    }

    /// Uses the handle up without settling: the broker is to redeliver, or keeps the message parked.
    pub fn abandon(mut self) -> Tag {
        self.open = false;
        self.tag
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.open && !std::thread::panicking() {
            tracing::error!(
                target: "celery.worker",
                tag = self.tag,
                "A delivery was dropped unsettled: a bug of celeriac. The broker will redeliver it."
            );
        }
    }
}

/// What the configuration says of the broker.
#[derive(Clone, Debug, Deserialize)]
pub struct BrokerConfig {
    /// Addresses, the failover list in order.
    pub urls: Vec<String>,
    /// `broker_transport_options`.
    #[serde(default)]
    pub transport_options: serde_json::Map<String, serde_json::Value>,
    /// `broker_use_ssl`: false, true or a table of options.
    #[serde(default)]
    pub use_ssl: serde_json::Value,
    /// `broker_heartbeat`, seconds; 0 or none: off.
    #[serde(default)]
    pub heartbeat: Option<f64>,
    /// `broker_connection_timeout`, seconds.
    #[serde(default)]
    pub connection_timeout: Option<f64>,
    /// `broker_connection_retry`.
    pub retry: bool,
    /// `broker_connection_retry_on_startup`, resolved.
    pub retry_on_startup: bool,
    /// `broker_connection_max_retries`; none: for ever.
    #[serde(default)]
    pub max_retries: Option<u32>,
    /// `broker_failover_strategy`: `round-robin` or `shuffle`.
    #[serde(default)]
    pub failover_strategy: Option<String>,
    /// `broker_login_method`.
    #[serde(default)]
    pub login_method: Option<String>,
}

/// The broker for an address, where it is spoken natively. `None`: another scheme, which the Python bridge serves.
///
/// # Errors
/// When the scheme is ours and the address or an option is wrong.
pub fn by_url(url: &str, config: &BrokerConfig) -> Result<Option<Arc<dyn Broker>>, BrokerError> {
    if let Some(broker) = amqp::Amqp::new(url, config)? {
        return Ok(Some(broker));
    }
    if let Some(broker) = redis::RedisBroker::new(url, config)? {
        return Ok(Some(Arc::new(broker)));
    }
    match url.split_once("://").map_or(url, |(scheme, _)| scheme) {
        "filesystem" => Ok(Some(Arc::new(filesystem::FilesystemBroker::open(url, config)?))),
        "memory" => Ok(Some(Arc::new(memory::MemoryBroker::open(url)))),
        _ => Ok(None),
    }
}
