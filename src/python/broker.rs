//! Any kombu transport as a [`Broker`]: python/celeriac/kombu_bridge.py drives kombu's own objects in a thread of
//! its own, one a session, and this is what it talks to.
//!
//! The thread holds the GIL only while it works: it lets go of it to wait for the connection and for commands. A
//! command is put into a channel and announced by a byte on a socket, so that a thread that waits for its broker in
//! select(2) wakes up for us too.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::broker::{
    Broker, COMMAND_CAPACITY, Capabilities, Command, Consume, Delivery, EVENT_CAPACITY, Event, Handle,
    Session, Settlement, Tag,
};
use crate::error::BrokerError;
use crate::protocol::{DeliveryInfo, Json, Message};

/// Tags of one session; those of the next begin after them.
const TAGS: u64 = 1 << 40;

/// kombu's connection to one address.
struct KombuBroker {
    /// `celeriac.kombu_bridge.Bridge`.
    bridge: Arc<Py<PyAny>>,
    address: String,
    fanout: bool,
    sessions: AtomicU64,
}

/// The broker that a `celeriac.kombu_bridge.Bridge` speaks to.
///
/// # Errors
/// When it is none.
pub(super) fn kombu_broker(py: Python<'_>, bridge: Py<PyAny>) -> PyResult<Arc<dyn Broker>> {
    let address = bridge.getattr(py, "address")?.extract(py)?;
    let fanout = bridge.getattr(py, "fanout")?.extract(py)?;
    Ok(Arc::new(KombuBroker { bridge: Arc::new(bridge), address, fanout, sessions: AtomicU64::new(1) }))
}

#[async_trait]
impl Broker for KombuBroker {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            settles_across_sessions: false,
            parks: false,
            fanout: self.fanout,
            remembers: false,
            listens: false,
        }
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        let failed = |reason: String| BrokerError::Connection { address: self.address.clone(), reason };
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (event_sender, events) = mpsc::channel(EVENT_CAPACITY);
        let (commands, command_receiver) = mpsc::channel(COMMAND_CAPACITY);
        let (queue, queued) = mpsc::channel(COMMAND_CAPACITY);
        let (bell, waker) = UnixStream::pair().map_err(|error| failed(error.to_string()))?;
        for end in [&bell, &waker] {
            end.set_nonblocking(true).map_err(|error| failed(error.to_string()))?;
        }
        let (started, start) = oneshot::channel();
        let port = KombuPort {
            address: self.address.clone(),
            bell,
            events: event_sender,
            inbox: Mutex::new(Inbox { queued, started: Some(started), answers: Vec::new(), closing: None }),
        };
        let plan = json!({
            "node": consume.node,
            "queues": consume.queues,
            "prefetch": consume.prefetch,
            "control": consume.control.is_some() && self.fanout,
            "first_tag": number * TAGS,
        })
        .to_string();
        let bridge = Arc::clone(&self.bridge);
        std::thread::Builder::new()
            .name("celeriac-kombu".to_owned())
            .spawn(move || Python::attach(|py| serve(py, &bridge, &plan, port)))
            .map_err(|error| failed(format!("cannot start a thread: {error}")))?;

        // From here on the thread is told when nobody wants it any more: the task's end closes the channel.
        let mut tasks = JoinSet::new();
        tasks.spawn(forward(command_receiver, Bell(waker), queue));
        start.await.unwrap_or_else(|_| Err(failed("kombu's thread ended".to_owned())))?;
        Ok(Session { events, commands, tasks })
    }
}

/// Runs a session to its end, on its thread.
fn serve(py: Python<'_>, bridge: &Py<PyAny>, plan: &str, port: KombuPort) {
    let result = Py::new(py, port).and_then(|port| {
        let served = bridge.call_method1(py, "serve", (plan, &port));
        let port = port.get();
        let reason = match &served {
            Ok(_) => "kombu's thread ended".to_owned(),
            Err(error) => error.to_string(),
        };
        // Says nothing where the session has ended in order.
        port.end(py, BrokerError::Connection { address: port.address.clone(), reason });
        served
    });
    if let Err(error) = result {
        tracing::error!(target: "celery.worker.consumer", "kombu's thread failed: {error}");
    }
}

/// Wakes kombu's thread. Dropping it wakes it, too: the other end of a closed socket can be read.
struct Bell(UnixStream);

impl Bell {
    fn ring(&self) {
        // A full socket has rung already, a closed one has nobody to wake.
        let _ = (&self.0).write(&[1]);
    }
}

/// Hands commands to kombu's thread.
async fn forward(mut commands: mpsc::Receiver<Command>, bell: Bell, queue: mpsc::Sender<Command>) {
    while let Some(command) = commands.recv().await {
        if queue.send(command).await.is_err() {
            return;
        }
        bell.ring();
    }
}

/// What kombu's thread has of the session.
#[pyclass(frozen, module = "celeriac._core")]
pub(super) struct KombuPort {
    address: String,
    bell: UnixStream,
    events: mpsc::Sender<Event>,
    inbox: Mutex<Inbox>,
}

struct Inbox {
    queued: mpsc::Receiver<Command>,
    started: Option<oneshot::Sender<Result<(), BrokerError>>>,
    /// Publications and queues that were not answered yet, by number.
    answers: Vec<Option<oneshot::Sender<Result<(), BrokerError>>>>,
    closing: Option<oneshot::Sender<()>>,
}

/// A command as Python takes it: its name and its arguments.
type Told = (&'static str, Py<PyAny>);

/// A message as Python hands it over: body, headers, properties, content type and encoding, exchange, routing key,
/// whether it was delivered before.
type Given = (Py<PyBytes>, String, String, Option<String>, Option<String>, String, String, bool);

impl KombuPort {
    fn with<T>(&self, work: impl FnOnce(&mut Inbox) -> T) -> T {
        work(&mut self.inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends an event. `false`: nobody wants it any more.
    fn send(&self, py: Python<'_>, event: Event) -> bool {
        // The worker may be busy; others want to run Python meanwhile.
        py.detach(|| match self.events.blocking_send(event) {
            Ok(()) => true,
            Err(mpsc::error::SendError(Event::Deliveries(deliveries))) => {
                // kombu puts back what it holds when the connection is closed.
                for delivery in deliveries {
                    delivery.handle.abandon();
                }
                false
            }
            Err(_) => false,
        })
    }

    fn end(&self, py: Python<'_>, error: BrokerError) {
        let (started, closing) = self.with(|inbox| {
            // Whoever waits for an answer is told that there is none.
            inbox.answers.clear();
            inbox.queued.close();
            (inbox.started.take(), inbox.closing.take())
        });
        match (started, closing) {
            // Nobody may be left to hear any of it.
            (_, Some(closing)) => drop(closing.send(())),
            (Some(started), None) => drop(started.send(Err(error))),
            (None, None) => drop(self.send(py, Event::Lost(error))),
        }
    }

    fn error(&self, reason: String, retryable: bool) -> BrokerError {
        let address = self.address.clone();
        if retryable {
            BrokerError::Connection { address, reason }
        } else {
            BrokerError::Refused { address, reason }
        }
    }

    /// Keeps who waits for an answer; the number to answer by.
    fn expect(&self, answer: oneshot::Sender<Result<(), BrokerError>>) -> usize {
        self.with(|inbox| {
            let free = inbox.answers.iter().position(Option::is_none).unwrap_or(inbox.answers.len());
            if free == inbox.answers.len() {
                inbox.answers.push(None);
            }
            inbox.answers[free] = Some(answer);
            free
        })
    }

    fn told(&self, py: Python<'_>, command: Command) -> PyResult<Told> {
        let object = |value: Bound<'_, PyAny>| value.unbind();
        Ok(match command {
            Command::Settle(settlements) => {
                let settlements: Vec<(Tag, &str)> =
                    settlements.into_iter().map(|(tag, how)| (tag, name_of(how))).collect();
                ("settle", object(settlements.into_pyobject(py)?))
            }
            Command::Prefetch(count) => ("prefetch", object(count.into_pyobject(py)?.into_any())),
            Command::Consume(queue, answer) => {
                let arguments = (self.expect(answer), json!(queue).to_string());
                ("consume", object(arguments.into_pyobject(py)?.into_any()))
            }
            Command::Cancel(name) => ("cancel", object(name.into_pyobject(py)?.into_any())),
            Command::Pause => ("pause", py.None()),
            Command::Publish(publication, answer) => {
                let number = self.expect(answer);
                let message = publication.message;
                let arguments = (
                    number,
                    publication.exchange,
                    publication.exchange_type,
                    publication.routing_key,
                    PyBytes::new(py, &message.body),
                    String::from_utf8_lossy(message.headers.as_bytes()).into_owned(),
                    String::from_utf8_lossy(message.properties.as_bytes()).into_owned(),
                    message.content_type,
                    message.content_encoding,
                );
                ("publish", object(arguments.into_pyobject(py)?.into_any()))
            }
            Command::Close(answer) => {
                self.with(|inbox| inbox.closing = Some(answer));
                ("close", py.None())
            }
            // The worker does not park where the broker cannot.
            Command::Park { .. }
            | Command::Unpark(_)
            | Command::Resume
            | Command::Remember(_)
            | Command::Listen(_)
            | Command::Deafen(_) => ("pass", py.None()),
        })
    }
}

fn name_of(settlement: Settlement) -> &'static str {
    match settlement {
        Settlement::Ack => "ack",
        Settlement::Reject => "reject",
        Settlement::Requeue | Settlement::GiveBack => "requeue",
    }
}

fn message_of(py: Python<'_>, given: Given, queue: String) -> (Message, DeliveryInfo) {
    let (body, headers, properties, content_type, content_encoding, exchange, routing_key, redelivered) =
        given;
    let message = Message {
        content_type,
        content_encoding,
        headers: Json(Bytes::from(headers)),
        properties: Json(Bytes::from(properties)),
        body: Bytes::copy_from_slice(body.as_bytes(py)),
    };
    (message, DeliveryInfo { exchange, routing_key, redelivered, queue })
}

#[pymethods]
impl KombuPort {
    /// The descriptor that can be read when there are commands.
    fn fileno(&self) -> i32 {
        self.bell.as_raw_fd()
    }

    /// The commands that have come, without waiting. Ends with `("stop", None)` when the session was dropped.
    fn take(&self, py: Python<'_>) -> PyResult<Vec<Told>> {
        let mut rings = [0; 256];
        while matches!((&self.bell).read(&mut rings), Ok(read) if read == rings.len()) {}
        let mut told = Vec::new();
        loop {
            match self.with(|inbox| inbox.queued.try_recv()) {
                Ok(command) => told.push(self.told(py, command)?),
                Err(mpsc::error::TryRecvError::Empty) => return Ok(told),
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    told.push(("stop", py.None()));
                    return Ok(told);
                }
            }
        }
    }

    /// Connected and consuming.
    fn started(&self) {
        if let Some(started) = self.with(|inbox| inbox.started.take()) {
            // Nobody may be left to hear it.
            let _ = started.send(Ok(()));
        }
    }

    /// Connecting failed, or the connection is lost.
    fn lost(&self, py: Python<'_>, reason: String, retryable: bool) {
        let error = self.error(reason, retryable);
        self.end(py, error);
    }

    /// Hands over messages: tag, queue and the message. `False`: nobody wants them any more.
    fn deliver(&self, py: Python<'_>, messages: Vec<(Tag, String, Given)>) -> bool {
        let deliveries = messages
            .into_iter()
            .map(|(tag, queue, given)| {
                let (message, info) = message_of(py, given, queue);
                Delivery { message, info, handle: Handle::new(tag) }
            })
            .collect();
        self.send(py, Event::Deliveries(deliveries))
    }

    /// Hands over a message of remote control.
    fn control(&self, py: Python<'_>, message: Given) -> bool {
        let (message, _) = message_of(py, message, String::new());
        self.send(py, Event::Control(message))
    }

    /// The broker has taken a publication or consumes a queue, or this is why not.
    fn answer(&self, number: usize, error: Option<String>) {
        let answer = self.with(|inbox| inbox.answers.get_mut(number).and_then(Option::take));
        if let Some(answer) = answer {
            // Nobody may be left to hear it.
            let _ = answer.send(error.map_or(Ok(()), |reason| Err(self.error(reason, true))));
        }
    }
}
