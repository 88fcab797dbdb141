//! The worker: broker, pool, backend and the program around it, held together by one loop.
//!
//! The start order is [`run`], read from top to bottom; the loop is in `consumer`.

pub mod acks;
mod announce;
mod asking;
mod autoscale;
mod consumer;
mod continuations;
pub mod dispatch;
pub mod hooks;
pub mod hosting;
pub mod inside;
mod intake;
mod jobs;
mod life;
mod link;
mod neighbours;
mod outcomes;
mod panel;
mod ready;
pub mod request;
mod results;
pub mod revoked;
pub mod schedule;
pub mod shutdown;
mod signals;
pub mod told;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::ResultBackend;
use crate::broker::reconnect::Failover;
use crate::broker::{Broker, Consume};
use crate::config::Config;
use crate::error::Error;
use crate::pool;
use crate::probes::{Listener, Seat};
use consumer::{Consumer, Inbox};
use hooks::Hooks;
use link::Link;
use shutdown::{Cause, Phase};

/// What a worker is made of.
pub struct Parts {
    /// The failover list, in order.
    pub brokers: Vec<Arc<dyn Broker>>,
    /// Where results go; `None`: children write them themselves, or nobody does.
    pub backend: Option<Arc<dyn ResultBackend>>,
    /// The pool.
    pub pool: pool::Running,
    /// The program around it.
    pub hooks: Arc<dyn Hooks>,
    /// Asks for a warm stop, besides the signals.
    pub stop: CancellationToken,
    /// Whether the worker listens to the signals of its process.
    pub signals: bool,
}

/// How a worker ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Exit status.
    pub code: i32,
    /// SIGHUP asked for a start anew.
    pub restart: bool,
    /// What broke it, if something did.
    pub broken: Option<String>,
}

/// How long children have for their exit hooks at a warm stop; each has its own limit within.
const WARM_LEAVE: Duration = Duration::from_secs(15);
/// The same at a cold one.
const COLD_LEAVE: Duration = Duration::from_secs(5);
/// How long results may still be written after the last task.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
/// How long the broker has to hear the last settlements.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Runs a worker until it is told to stop.
///
/// # Errors
/// When the configuration cannot be used. A worker that ran and broke says so in [`Exit::broken`].
pub async fn run(config: Config, parts: Parts) -> Result<Exit, Error> {
    let (_listener, seat) = match &config.http {
        Some(address) => Listener::start(address).map(|(listener, seat)| (Some(listener), seat))?,
        None => (None, Seat::empty()),
    };
    let consume = Consume {
        node: config.hostname.clone(),
        queues: config.queues.clone(),
        prefetch: config.prefetch(),
        paused: false,
        control: config.control.clone(),
        held: Default::default(),
    };
    let link = Link::new(Failover::new(parts.brokers, &config.broker), consume);

    let mut tasks = JoinSet::new();
    let (written_tx, written) = mpsc::unbounded_channel();
    let writes = parts.backend.map(|backend| {
        let (writes, inbox) = mpsc::unbounded_channel();
        tasks.spawn(results::run(backend, inbox, written_tx));
        writes
    });
    let (cause, causes) = mpsc::unbounded_channel();
    let mut listeners = JoinSet::new();
    if parts.signals {
        signals::listen(&mut listeners, &cause, parts.hooks.clone(), config.shutdown.hup_restarts)?;
        parts.hooks.notice(hooks::Notice::Listening);
    }
    listeners.spawn({
        let stop = parts.stop.clone();
        async move {
            stop.cancelled().await;
            let _ = cause.send(Cause::Remote);
        }
    });

    let mut inbox = Inbox { pool: parts.pool.events, written, causes };
    let mut consumer = Consumer::new(config, link, parts.pool.pool, parts.hooks, writes, seat)?;
    let exit = consumer.run(&mut inbox).await;
    leave(&mut consumer, inbox, tasks).await;
    Ok(exit)
}

/// Children out, results written, broker told; each within its time.
async fn leave(consumer: &mut Consumer, mut inbox: Inbox, mut writers: JoinSet<()>) {
    let hard = consumer.shutdown.phase == Phase::Hard;
    let patience = match consumer.shutdown.phase {
        Phase::Hard => Duration::ZERO,
        Phase::Cold => COLD_LEAVE,
        Phase::Running | Phase::Warm | Phase::Soft => WARM_LEAVE,
    };
    let deadline = Instant::now() + patience;
    consumer.pool.stop(deadline);
    let grace = Duration::from_secs(1);
    let _ =
        tokio::time::timeout_at(deadline + grace, async { while inbox.pool.recv().await.is_some() {} }).await;
    consumer.writes = None;
    if !hard {
        let _ = tokio::time::timeout(WRITE_PATIENCE, async { while writers.join_next().await.is_some() {} })
            .await;
    }
    consumer.abandon();
    consumer.announce_rest().await;
    consumer.link.close(Instant::now() + CLOSE_PATIENCE).await;
}
