//! The worker's [`Hooks`], served by Python's main thread.
//!
//! The worker runs on a thread of its own and puts calls into a channel; the main thread, with the GIL released
//! while it waits, carries them out in order on the hooks object of `python/celeriac/bridge.py`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::broker::Settlement;
use crate::logging::{LineConfig, LineWriter};
use crate::protocol::{DeliveryInfo, Message};
use crate::worker::hooks::{Hooks, LogRecord, Notice, Report, Unstarted};
use crate::worker::hosting::{Hosted, Order};
use crate::worker::told::Account;

/// How often the main thread looks for Python-level signal handlers when nothing else wakes it.
const CHECK_SIGNALS: Duration = Duration::from_secs(5);

/// One call for the main thread.
pub(super) enum Call {
    Notice(Notice),
    Log(LogRecord),
    Received(Box<(Message, DeliveryInfo)>, oneshot::Sender<()>),
    Report(Box<Report>, oneshot::Sender<Account>),
    StoreRevoked(Vec<Unstarted>, oneshot::Sender<()>),
    Control(String, Value, oneshot::Sender<Option<Value>>),
    Host(Hosted, oneshot::Sender<Option<Settlement>>),
    Over,
}

/// The worker's side.
pub(super) struct PyHooks {
    calls: Sender<Call>,
    /// Refreshed after each notice: handlers of `worker_ready` connect others.
    wants_received: Arc<AtomicBool>,
    /// Writes records with data, the lines of received tasks, where Python need not see them.
    lines: Option<Mutex<LineWriter>>,
    /// What the app's own objects ask for, until the worker takes it.
    orders: Mutex<Option<mpsc::UnboundedReceiver<Order>>>,
}

/// The main thread's end.
pub(super) struct Inbox {
    calls: Receiver<Call>,
    wants_received: Arc<AtomicBool>,
}

/// The channel's two ends.
pub(super) fn pair(
    wants_received: bool,
    lines: Option<&LineConfig>,
    orders: Option<mpsc::UnboundedReceiver<Order>>,
) -> (PyHooks, Sender<Call>, Inbox) {
    let (calls, inbox) = channel();
    let lines = lines.and_then(LineWriter::new).map(Mutex::new);
    let wants_received = Arc::new(AtomicBool::new(wants_received));
    let inbox = Inbox { calls: inbox, wants_received: wants_received.clone() };
    (PyHooks { calls: calls.clone(), wants_received, lines, orders: Mutex::new(orders) }, calls, inbox)
}

#[async_trait]
impl Hooks for PyHooks {
    fn notice(&self, notice: Notice) {
        let _ = self.calls.send(Call::Notice(notice));
    }

    fn log(&self, record: LogRecord) {
        if let Some(lines) = &self.lines
            && record.data.is_some()
            && let Ok(mut lines) = lines.lock()
            && lines.info(&record).is_ok()
        {
            return;
        }
        let _ = self.calls.send(Call::Log(record));
    }

    fn wants_received(&self) -> bool {
        self.wants_received.load(Ordering::Relaxed)
    }

    async fn received(&self, message: &Message, info: &DeliveryInfo) {
        let (done, answer) = oneshot::channel();
        if self.calls.send(Call::Received(Box::new((message.clone(), info.clone())), done)).is_ok() {
            let _ = answer.await;
        }
    }

    async fn report(&self, report: Report) -> Account {
        let (done, answer) = oneshot::channel();
        if self.calls.send(Call::Report(Box::new(report), done)).is_err() {
            return Account::default();
        }
        answer.await.unwrap_or_default()
    }

    async fn store_revoked(&self, tasks: Vec<Unstarted>) {
        let (done, answer) = oneshot::channel();
        if self.calls.send(Call::StoreRevoked(tasks, done)).is_ok() {
            let _ = answer.await;
        }
    }

    async fn control(&self, method: &str, arguments: Value) -> Option<Value> {
        let (done, answer) = oneshot::channel();
        self.calls.send(Call::Control(method.to_owned(), arguments, done)).ok()?;
        answer.await.ok().flatten()
    }

    fn host(&self, event: Hosted) -> BoxFuture<'static, Option<Settlement>> {
        let (done, answer) = oneshot::channel();
        // Sent now: the order of events is that of the calls of this method.
        let _ = self.calls.send(Call::Host(event, done));
        Box::pin(async move { answer.await.ok().flatten() })
    }

    fn orders(&self) -> mpsc::UnboundedReceiver<Order> {
        let taken = self.orders.lock().ok().and_then(|mut orders| orders.take());
        taken.unwrap_or_else(|| mpsc::unbounded_channel().1)
    }
}

/// Serves calls until [`Call::Over`]. An exception of a hook is the hook object's own business: it logs what user
/// code raises. What it lets through ends the worker.
pub(super) fn serve(py: Python<'_>, hooks: &Bound<'_, PyAny>, inbox: Inbox) -> PyResult<()> {
    let mut next = None;
    let Inbox { calls, wants_received } = inbox;
    // `Receiver` is not `Sync`; only this thread uses it, with and without the GIL.
    let mut inbox = Some(calls);
    loop {
        let call = match next.take() {
            Some(call) => call,
            None => {
                let waiting = inbox.take().expect("put back below");
                let (waiting, got) = py.detach(move || {
                    let got = waiting.recv_timeout(CHECK_SIGNALS);
                    (waiting, got)
                });
                inbox = Some(waiting);
                match got {
                    Ok(call) => call,
                    Err(RecvTimeoutError::Timeout) => {
                        py.check_signals()?;
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        };
        match call {
            Call::Over => return Ok(()),
            Call::Log(first) => {
                let mut records = vec![first];
                while let Some(more) = inbox.as_ref().and_then(|inbox| inbox.try_recv().ok()) {
                    match more {
                        Call::Log(record) => records.push(record),
                        other => {
                            next = Some(other);
                            break;
                        }
                    }
                }
                log(hooks, records)?;
            }
            Call::Notice(notice) => {
                hooks.call_method1("notice", (text(&notice),))?;
                wants_received.store(hooks.getattr("wants_received")?.is_truthy()?, Ordering::Relaxed);
            }
            call => one(py, hooks, call)?,
        }
    }
}

fn log(hooks: &Bound<'_, PyAny>, records: Vec<LogRecord>) -> PyResult<()> {
    let rows: Vec<_> = records
        .into_iter()
        .map(|record| {
            let task = record.task.map(|task| text(&task));
            (record.logger, record.level, record.message, record.data.map(|data| data.to_string()), task)
        })
        .collect();
    hooks.call_method1("log", (rows,))?;
    Ok(())
}

fn one(py: Python<'_>, hooks: &Bound<'_, PyAny>, call: Call) -> PyResult<()> {
    match call {
        Call::Received(parts, done) => {
            let (message, info) = *parts;
            hooks.call_method1("received", (envelope(&message, &info), PyBytes::new(py, &message.body)))?;
            let _ = done.send(());
        }
        Call::Report(report, done) => {
            let body = PyBytes::new(py, &report.message.body);
            let answer = hooks.call_method1(
                "report",
                (text(&report.what), envelope(&report.message, &report.info), body, report.pid),
            )?;
            let answer: Option<String> = answer.extract()?;
            let account = answer.and_then(|answer| serde_json::from_str(&answer).ok());
            let _ = done.send(account.unwrap_or_default());
        }
        Call::StoreRevoked(tasks, done) => {
            hooks.call_method1("store_revoked", (text(&tasks),))?;
            let _ = done.send(());
        }
        Call::Control(method, arguments, done) => {
            let answer = hooks.call_method1("control", (method, arguments.to_string()))?;
            let answer: Option<String> = answer.extract()?;
            let _ = done.send(answer.and_then(|answer| serde_json::from_str(&answer).ok()));
        }
        Call::Host(event, done) => {
            let (parts, data) = match &event {
                Hosted::Deliver { message, info, .. } | Hosted::Received { message, info, .. } => {
                    (Some(envelope(message, info)), Some(PyBytes::new(py, &message.body)))
                }
                Hosted::Answered { value, .. } => (None, Some(PyBytes::new(py, value))),
                Hosted::Execute { .. }
                | Hosted::Revoked { .. }
                | Hosted::Forget { .. }
                | Hosted::Terminate { .. }
                | Hosted::Cancelled { .. }
                | Hosted::Accepted { .. }
                | Hosted::TimedOut { .. }
                | Hosted::Lost { .. }
                | Hosted::Terminated { .. } => (None, None),
            };
            let answer = hooks.call_method1("hosted", (text(&event), parts, data))?;
            let answer: Option<String> = answer.extract()?;
            let _ = done.send(answer.as_deref().and_then(settlement));
        }
        Call::Notice(_) | Call::Log(_) | Call::Over => {}
    }
    Ok(())
}

pub(super) fn settlement(name: &str) -> Option<Settlement> {
    match name {
        "ack" => Some(Settlement::Ack),
        "reject" => Some(Settlement::Reject),
        "requeue" => Some(Settlement::Requeue),
        _ => None,
    }
}

fn text(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Everything of a message but its body.
fn envelope(message: &Message, info: &DeliveryInfo) -> String {
    json!({
        "headers": message.headers.value().unwrap_or_default(),
        "properties": message.properties.value().unwrap_or_default(),
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "delivery_info": {
            "exchange": info.exchange,
            "routing_key": info.routing_key,
            "redelivered": info.redelivered,
        },
    })
    .to_string()
}
