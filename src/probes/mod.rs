//! Probes and metrics: one small HTTP listener on a thread of its own.
//!
//! The thread only sleeps and answers, so that the kernel lets it run at once however busy children and loop are. It
//! owns nothing: `/livez` looks at the [`Pulse`], which the loop beats once a turn, and nudges a loop that has not turned
//! lately; `/readyz` and `/metrics` ask the loop, which answers between two turns, or does not, and that is an answer too.

mod server;
#[cfg(test)]
mod tests;

use std::net::{TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::metrics::Figures;

/// A loop that turned so lately is alive without being asked.
const RECENT: Duration = Duration::from_secs(1);
/// A loop that was asked to turn and has not for so long is taken for dead. Turns last milliseconds; what lasts seconds
/// is a machine that swaps or was suspended, which a restart does not help.
const HUNG: Duration = Duration::from_secs(10);
/// How long the loop has for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Questions that may wait for the loop; those beyond are answered as if it had not.
const QUESTIONS: usize = 64;

/// What the listener asks of the loop.
#[derive(Debug)]
pub enum Question {
    /// To turn: there is nothing to answer.
    Turn,
    /// Why the worker is not ready; nothing: it is.
    Ready(oneshot::Sender<Vec<String>>),
    /// The numbers.
    Figures(oneshot::Sender<Box<Figures>>),
}

/// When the loop turned last.
#[derive(Debug)]
struct Pulse {
    born: Instant,
    /// When it turned last.
    turned: AtomicU64,
    /// There is no loop any more: the worker is on its way out, which has deadlines of its own.
    over: AtomicBool,
}

impl Pulse {
    /// A moment in microseconds from `born`. All are rounded alike, so that a turn after a question is never before it.
    fn micros(&self, moment: Instant) -> u64 {
        u64::try_from(moment.saturating_duration_since(self.born).as_micros()).unwrap_or(u64::MAX)
    }

    fn beat(&self) {
        self.turned.store(self.micros(Instant::now()), Ordering::Relaxed);
    }
}

/// The loop's end. Without a listener nobody ever asks, and nothing is noted.
#[derive(Debug)]
pub struct Seat {
    /// What is asked.
    pub questions: mpsc::Receiver<Question>,
    pulse: Option<Arc<Pulse>>,
}

impl Seat {
    /// That of a worker without a listener.
    pub fn empty() -> Self {
        Self { questions: mpsc::channel(1).1, pulse: None }
    }

    /// The loop turns.
    pub fn turned(&self) {
        if let Some(pulse) = &self.pulse {
            pulse.beat();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(pulse) = &self.pulse {
            pulse.over.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether the loop lives, as far as `/livez` can tell.
#[derive(Debug, PartialEq, Eq)]
enum Life {
    Turning,
    /// It has not turned for so long.
    Hung(Duration),
}

/// The listener's end.
struct Probe {
    pulse: Arc<Pulse>,
    questions: mpsc::Sender<Question>,
    /// When the loop was last asked to turn, as [`Pulse::micros`]; 0: never.
    asked: AtomicU64,
}

impl Probe {
    /// Never waits. A loop sleeps while nothing happens, so that one which has not turned is first asked to; it is taken
    /// for dead by a later probe.
    fn life(&self, now: Instant) -> Life {
        let now = self.pulse.micros(now);
        let since = |then: u64| Duration::from_micros(now.saturating_sub(then));
        let turned = self.pulse.turned.load(Ordering::Relaxed);
        if since(turned) < RECENT || self.pulse.over.load(Ordering::Relaxed) {
            return Life::Turning;
        }
        // Only the listener's thread is here.
        let asked = self.asked.load(Ordering::Relaxed);
        if asked <= turned {
            // Where the channel is full the loop has been asked often enough.
            let _ = self.questions.try_send(Question::Turn);
            self.asked.store(now, Ordering::Relaxed);
        } else if since(asked) >= HUNG {
            return Life::Hung(since(turned));
        }
        Life::Turning
    }

    /// Asks the loop; why there is no answer, where there is none.
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, &'static str> {
        const STOPPING: &str = "the worker is stopping";
        const SILENT: &str = "the worker's loop does not answer";
        let (answer, answered) = oneshot::channel();
        match self.questions.try_send(question(answer)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(SILENT),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(STOPPING),
        }
        match tokio::time::timeout(ANSWER_WITHIN, answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(STOPPING),
            Err(_) => Err(SILENT),
        }
    }
}

/// `host:port`; an empty host is every address of the machine.
///
/// # Errors
/// What is wrong with it.
pub fn parse_address(text: &str) -> Result<(String, u16), String> {
    let wrong = || format!("'{text}' is not host:port or :port");
    let (host, port) = text.trim().rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse::<u16>().map_err(|_| wrong())?;
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match bare {
        Some(address) => Ok((address.to_owned(), port)),
        None if host.contains([':', '/', '[', ']']) => Err(wrong()),
        None => Ok((host.to_owned(), port)),
    }
}

/// A running listener; dropping it closes its port.
pub struct Listener {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
    /// Where it listens.
    pub address: std::net::SocketAddr,
}

impl Listener {
    /// Listens, and answers from now on.
    ///
    /// # Errors
    /// [`Error::Config`] when the address cannot be listened at.
    pub fn start(address: &str) -> Result<(Self, Seat), Error> {
        let refuse = |why: String| Error::Config(format!("--http {address}: {why}"));
        let (host, port) = parse_address(address).map_err(refuse)?;
        let socket = listen(&host, port).map_err(|error| {
            refuse(format!("cannot listen there: {error}. Give another address, or stop what uses this one."))
        })?;
        let at = socket.local_addr().map_err(|error| refuse(error.to_string()))?;
        let born = Instant::now();
        let pulse = Arc::new(Pulse { born, turned: AtomicU64::new(0), over: AtomicBool::new(false) });
        let (questions, inbox) = mpsc::channel(QUESTIONS);
        let probe = Probe { pulse: Arc::clone(&pulse), questions, asked: AtomicU64::new(0) };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let internal =
            |error: std::io::Error| Error::Internal(format!("cannot serve --http {address}: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(internal)?;
        let thread = std::thread::Builder::new()
            .name("celeriac-http".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = stopped.cancelled() => {}
                        () = server::serve(socket, Arc::new(probe)) => {}
                    }
                });
            })
            .map_err(internal)?;
        tracing::info!(target: "celery.worker", "Probes and metrics are at http://{at}/");
        let seat = Seat { questions: inbox, pulse: Some(pulse) };
        Ok((Self { stop, thread: Some(thread), address: at }, seat))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but this.
            let _ = thread.join();
        }
    }
}

fn listen(host: &str, port: u16) -> std::io::Result<TcpListener> {
    let socket = if host.is_empty() {
        // Where there is no IPv6 the other is all there is.
        match TcpListener::bind(("::", port)) {
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                TcpListener::bind(("0.0.0.0", port))?
            }
            other => other?,
        }
    } else {
        let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
        TcpListener::bind(&addresses[..])?
    };
    socket.set_nonblocking(true)?;
    Ok(socket)
}
