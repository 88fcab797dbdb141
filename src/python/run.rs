//! `_core.run_worker`: the worker on a thread of its own, its hooks on this one.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use pyo3::prelude::*;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Level;

use super::broker::kombu_broker;
use super::errors::exception;
use super::hooks::{Call, PyHooks, pair, serve};
use super::hosting::Desk;
use super::log::ToPython;
use crate::broker::{Broker, BrokerConfig};
use crate::config::Config;
use crate::error::{BrokerError, Error, mask};
use crate::pool::zygote::ZygoteHandle;
use crate::worker::{Exit, Parts};
use crate::{backend, broker, pool, worker};

/// Runs the worker until it ends: `(exit status, restart, what broke it)`. Takes over the zygote's socket.
/// Must be called on the main thread; hooks run there. `bridges` are the brokers where kombu speaks to them, `desk` is
/// where the app's own `Request` and `Strategy` objects ask for things.
#[pyfunction]
#[pyo3(signature = (config, hooks, *, zygote_fd, zygote_pid, wants_received, bridges=None, desk=None))]
#[expect(clippy::too_many_arguments, reason = "named in Python; called from one place")]
pub(super) fn run_worker(
    py: Python<'_>,
    config: &str,
    hooks: &Bound<'_, PyAny>,
    zygote_fd: RawFd,
    zygote_pid: u32,
    wants_received: bool,
    bridges: Option<Vec<Py<PyAny>>>,
    desk: Option<PyRef<'_, Desk>>,
) -> PyResult<(i32, bool, Option<String>)> {
    // SAFETY: python/celeriac/bridge.py detaches the descriptor from its socket object and gives it away here.
    #[expect(unsafe_code, reason = "a descriptor changes hands")]
    let socket = unsafe { OwnedFd::from_raw_fd(zygote_fd) };
    let config = Config::from_json(config).map_err(|error| exception(py, &error))?;
    let bridges = bridges
        .map(|bridges| {
            bridges.into_iter().map(|bridge| kombu_broker(py, bridge)).collect::<PyResult<Vec<_>>>()
        })
        .transpose()?;
    let (py_hooks, calls, inbox) =
        pair(wants_received, config.lines.as_ref(), desk.and_then(|desk| desk.take()));
    let most = match (config.log_debug, config.log_info) {
        (true, _) => Level::DEBUG,
        (false, true) => Level::INFO,
        (false, false) => Level::WARN,
    };
    // A second worker in one process keeps the first one's subscriber, whose channel is closed: it logs nothing of ours.
    let _ = tracing::subscriber::set_global_default(ToPython::new(calls.clone(), most));

    let thread = std::thread::Builder::new()
        .name("celeriac".to_owned())
        .spawn(move || {
            let ended = run(config, bridges, py_hooks, ZygoteHandle { socket, pid: zygote_pid });
            let _ = calls.send(Call::Over);
            ended
        })
        .map_err(|error| exception(py, &Error::Internal(format!("cannot start a thread: {error}"))))?;
    let served = serve(py, hooks, inbox);
    let ended = py.detach(|| thread.join());
    served?;
    match ended {
        Ok(Ok(exit)) => Ok((exit.code, exit.restart, exit.broken)),
        Ok(Err(error)) => Err(exception(py, &error)),
        Err(_) => Err(exception(py, &Error::Internal("the worker's thread panicked; see above".to_owned()))),
    }
}

/// The brokers of the configuration, all of which are spoken natively.
fn native_brokers(config: &BrokerConfig) -> Result<Vec<Arc<dyn Broker>>, Error> {
    let open = |url: &String| {
        broker::by_url(url, config)?.ok_or_else(|| {
            let reason = "only kombu speaks to it, and the ladder did not say so".to_owned();
            Error::Broker(BrokerError::Address { address: mask(url), reason })
        })
    };
    broker::reconnect::addresses(&config.urls).iter().map(open).collect()
}

fn run(
    config: Config,
    bridges: Option<Vec<Arc<dyn Broker>>>,
    hooks: PyHooks,
    zygote: ZygoteHandle,
) -> Result<Exit, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::Internal(format!("cannot start the runtime: {error}")))?;
    runtime.block_on(async move {
        let brokers = bridges.map_or_else(|| native_brokers(&config.broker), Ok)?;
        let backend = match (config.backend.native, backend::by_url(&config.backend, &config.broker)?) {
            (false, _) => None,
            (true, Some(backend)) => Some(backend),
            (true, None) => {
                let address = mask(&config.backend.url);
                return Err(Error::Internal(format!(
                    "results are to go through the supervisor, which has no backend for {address}"
                )));
            }
        };
        let tracker = TaskTracker::new();
        let pool = pool::processes::start(&config.pool, zygote, &tracker)?;
        let parts = Parts {
            brokers,
            backend,
            pool,
            hooks: Arc::new(hooks),
            stop: CancellationToken::new(),
            signals: true,
        };
        worker::run(config, parts).await
    })
}
