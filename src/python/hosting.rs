//! `celeriac._core.Desk`: what the app's own objects in the main process ask of the worker, from any thread.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use super::hooks::settlement;
use crate::worker::hosting::{Call, Order};
use crate::worker::inside::Inside;

/// Takes orders; the worker that is run with it carries them out. Orders to a worker that has ended are dropped.
#[pyclass(frozen, module = "celeriac._core")]
pub(super) struct Desk {
    orders: mpsc::UnboundedSender<Order>,
    inbox: Mutex<Option<mpsc::UnboundedReceiver<Order>>>,
}

impl Desk {
    /// The worker's end; once.
    pub(super) fn take(&self) -> Option<mpsc::UnboundedReceiver<Order>> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// Whether a worker has taken the other end.
    fn is_served(&self) -> bool {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

fn read<T: DeserializeOwned>(json: &str) -> PyResult<T> {
    serde_json::from_str(json).map_err(|error| PyValueError::new_err(error.to_string()))
}

#[pymethods]
impl Desk {
    #[new]
    fn new() -> Self {
        let (orders, inbox) = mpsc::unbounded_channel();
        Self { orders, inbox: Mutex::new(Some(inbox)) }
    }

    /// Tells the broker of a message: `ack`, `reject` or `requeue`.
    fn settle(&self, ticket: u64, how: &str) -> PyResult<()> {
        let settlement =
            settlement(how).ok_or_else(|| PyValueError::new_err(format!("no settlement: {how}")))?;
        self.order(Order::Settle { ticket, settlement });
        Ok(())
    }

    /// Runs a pickled call in the pool.
    #[pyo3(signature = (number, body, *, ticket, soft_limit, hard_limit))]
    fn call(
        &self,
        number: u64,
        body: &[u8],
        ticket: Option<u64>,
        soft_limit: Option<f64>,
        hard_limit: Option<f64>,
    ) {
        let body = Bytes::copy_from_slice(body);
        self.order(Order::Call(Call { number, ticket, body, soft_limit, hard_limit }));
    }

    /// Runs a command of remote control: its reply, as JSON, or RuntimeError with what it would have answered.
    fn ask(&self, py: Python<'_>, method: &str, arguments: &str) -> PyResult<String> {
        let over = || PyRuntimeError::new_err("the worker does not run");
        if !self.is_served() {
            return Err(over());
        }
        let (answer, told) = oneshot::channel();
        self.order(Order::Inside(Inside::Command {
            method: method.to_owned(),
            arguments: read(arguments)?,
            answer,
        }));
        // Without the GIL: what the worker does before it comes to this may need it.
        match py.detach(|| told.blocking_recv()) {
            Ok(Ok(value)) => Ok(value.to_string()),
            Ok(Err(exception)) => Err(PyRuntimeError::new_err(exception)),
            Err(_) => Err(over()),
        }
    }

    /// So many messages more, or less, may be unsettled.
    fn prefetch(&self, messages: i64) {
        self.order(Order::Inside(Inside::Prefetch(messages)));
    }

    /// The policies of all tasks, as `Config` has them.
    fn tasks(&self, policies: &str) -> PyResult<()> {
        self.order(Order::Inside(Inside::Tasks(read(policies)?)));
        Ok(())
    }

    /// Replaces all children by some that have loaded modules: `{"modules": [...], "reload": true}`.
    fn restart(&self, reload: &str) -> PyResult<()> {
        self.order(Order::Inside(Inside::Restart(read(reload)?)));
        Ok(())
    }

    /// Calls an election; the action is JSON.
    fn elect(&self, id: String, topic: String, action: &str) -> PyResult<()> {
        let action = serde_json::from_str(action)
            .map_err(|error| PyValueError::new_err(format!("the action of election {id}: {error}")))?;
        self.order(Order::Elect { id, topic, action });
        Ok(())
    }

    /// Sends an event: its type, and its fields as a JSON object.
    fn event(&self, kind: &str, fields: &str) -> PyResult<()> {
        let fields = serde_json::from_str(fields)
            .map_err(|error| PyValueError::new_err(format!("{kind}: the fields are no object: {error}")))?;
        self.order(Order::Event { kind: kind.to_owned(), fields });
        Ok(())
    }

    /// Kills the child that runs a call.
    fn terminate(&self, number: u64, signal: i32) {
        self.order(Order::Terminate { call: number, signal });
    }

    /// Consumes a queue too; it is described as in the configuration, in JSON.
    fn consume(&self, queue: &str) -> PyResult<()> {
        let queue = serde_json::from_str(queue).map_err(|error| PyValueError::new_err(error.to_string()))?;
        self.order(Order::Consume(Box::new(queue)));
        Ok(())
    }

    /// Stops consuming the queue of this name.
    fn cancel(&self, queue: String) {
        self.order(Order::Cancel(queue));
    }

    /// Ends the worker warmly with this exit status.
    fn stop(&self, code: i32) {
        self.order(Order::Stop { code });
    }
}
