//! A child's end of the frames: `celeriac._core.ChildPipe`.
//!
//! One thread at a time reads the socket and sorts what came; the others wait for it (`threads` has many). The GIL is
//! let go around every wait. A read that a signal interrupts runs the Python handlers and goes on; a write never
//! does, because a frame must not be cut in half by a handler that raises.
//!
//! With an event loop (`looped`) nothing waits here: the loop watches the descriptor and takes what came, frames are
//! kept until it flushes them once a turn, and a question is answered with its number.
//!
//! Where tasks are greenlets nothing of this is done by their thread (`green.rs`).

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyString, PyTuple};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::green::{Hub, read_some, write_some};
use crate::backend::{Counted, Part, Record};
use crate::broker::Publication;
use crate::broker::topology::Queue;
use crate::pool::ipc::{FromChild, ToChild, split};
use crate::pool::{Job, Outcome, Work};
use crate::protocol::Json;
use crate::protocol::signature::{self, Call};

/// Exit status of a child that leaves for good, and of one that is to be replaced (Celery's `EX_RECYCLE`).
const STOP: i32 = 0;
const RECYCLE: i32 = 0x9B;

/// What one read may bring; larger frames come in several.
const READ: usize = 64 * 1024;

/// The socket to the supervisor.
#[pyclass(frozen, module = "celeriac._core")]
pub(super) struct ChildPipe {
    socket: OwnedFd,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    writing: Mutex<BytesMut>,
    serial: AtomicU64,
    /// The process runs an event loop.
    looped: bool,
    /// Where tasks are greenlets.
    hub: Option<Hub>,
    /// The process that it belongs to.
    #[pyo3(get)]
    pid: u32,
}

#[derive(Default)]
struct Inbox {
    buffer: BytesMut,
    chunk: Vec<u8>,
    jobs: VecDeque<Job>,
    /// Answers, and who waits for one.
    stored: HashMap<u64, Option<Answer>>,
    counted: HashMap<u64, Counted>,
    /// What an event loop takes beside jobs.
    looped: Option<ForLoop>,
    leave: Option<i32>,
    closed: bool,
    reading: bool,
    /// Threads that wait for the one that reads; nobody is woken in vain when there are none.
    waiting: u32,
    /// What the hub has not been told of, where there is one.
    news: News,
    /// The hub is seeing to what could not be written at once.
    behind: bool,
}

/// Answers that have come, by number, and jobs that are to be ended, each with the hard limit that it has passed.
#[derive(Default)]
struct News {
    answered: Vec<u64>,
    interrupts: Vec<(u64, Option<f64>)>,
}

/// What came for an event loop, in order.
#[derive(Default)]
struct ForLoop {
    stored: Vec<(u64, Answer)>,
    counted: Vec<(u64, Tally)>,
    interrupts: Vec<(u64, bool)>,
}

/// The answer of the script that counts members of chords.
type Tally = (i64, Option<i64>, Option<i64>, bool);

fn tally(counted: Counted) -> Tally {
    let Counted { ready, added, size, sends } = counted;
    (ready, added, size, sends)
}

/// An answer, or where there is an event loop the number under which it will come.
#[derive(IntoPyObject)]
enum Reply<T> {
    Now(T),
    Later(u64),
}

/// The supervisor's answer to a store: nothing, or what went wrong.
type Answer = Option<String>;

enum Next {
    Job(Box<Job>),
    Leave(i32),
    Closed,
}

/// Who is to look at the inbox.
#[derive(Clone, Copy)]
enum Wake {
    /// So many threads: whichever, each finds a job.
    Some(usize),
    /// Every thread: something came that only a certain one wants, or that all want.
    All,
}

impl Wake {
    fn and_one(self) -> Self {
        match self {
            Self::Some(count) => Self::Some(count + 1),
            Self::All => Self::All,
        }
    }
}

enum Wait<T> {
    Done(T),
    Interrupted,
}

impl Inbox {
    fn next(&mut self) -> Option<Next> {
        // The job first: a stop does not overtake what was given before it.
        if let Some(job) = self.jobs.pop_front() {
            return Some(Next::Job(Box::new(job)));
        }
        if let Some(status) = self.leave {
            return Some(Next::Leave(status));
        }
        self.closed.then_some(Next::Closed)
    }

    /// Sorts the frames that are there; says who is to be woken.
    fn sort(&mut self) -> Wake {
        let mut wake = Wake::Some(0);
        loop {
            let frame = match split(&mut self.buffer) {
                Ok(Some(payload)) => ToChild::decode(payload),
                Ok(None) => return wake,
                Err(error) => Err(error),
            };
            match frame {
                Ok(ToChild::Run(job)) => {
                    self.jobs.push_back(*job);
                    wake = wake.and_one();
                }
                Ok(ToChild::Stored { serial, error }) => {
                    if let Some(looped) = &mut self.looped {
                        looped.stored.push((serial, error));
                        continue;
                    }
                    // Nobody waits any more when a soft limit was raised meanwhile.
                    if let Some(answer) = self.stored.get_mut(&serial) {
                        *answer = Some(error);
                    }
                    self.news.answered.push(serial);
                    wake = Wake::All;
                }
                Ok(ToChild::Counted { serial, counted }) => {
                    if let Some(looped) = &mut self.looped {
                        looped.counted.push((serial, tally(counted)));
                        continue;
                    }
                    if self.stored.contains_key(&serial) {
                        self.counted.insert(serial, counted);
                    }
                    self.news.answered.push(serial);
                    wake = Wake::All;
                }
                // Other children are signalled.
                Ok(ToChild::Cancel { job, soft }) => {
                    if let Some(looped) = &mut self.looped {
                        looped.interrupts.push((job, soft));
                    }
                }
                Ok(ToChild::Interrupt { job, limit }) => self.news.interrupts.push((job, limit)),
                Ok(ToChild::Stop) => (self.leave, wake) = (Some(STOP), Wake::All),
                Ok(ToChild::Recycle) => (self.leave, wake) = (Some(RECYCLE), Wake::All),
                // Both ends are of one build; a stream that cannot be read is as good as closed.
                Err(_) => {
                    self.closed = true;
                    return Wake::All;
                }
            }
        }
    }
}

impl ChildPipe {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `want` finds what it wants.
    fn wait<T: Send>(
        &self,
        py: Python<'_>,
        mut want: impl FnMut(&mut Inbox) -> Option<T> + Send,
    ) -> PyResult<T> {
        loop {
            // Waiting with the GIL would stop every other thread of the task's process.
            match py.detach(|| self.wait_detached(&mut want)) {
                Wait::Done(found) => return Ok(found),
                Wait::Interrupted => py.check_signals()?,
            }
        }
    }

    /// Waits for the answer with this number.
    fn wait_for<T: Send>(
        &self,
        py: Python<'_>,
        serial: u64,
        mut want: impl FnMut(&mut Inbox) -> Option<T> + Send,
    ) -> PyResult<T> {
        let Some(hub) = self.hub.as_ref().filter(|hub| hub.is_here()) else { return self.wait(py, want) };
        loop {
            let found = want(&mut self.inbox());
            match found {
                Some(found) => return Ok(found),
                None => hub.wait(py, serial)?,
            }
        }
    }

    fn wait_detached<T>(&self, want: &mut impl FnMut(&mut Inbox) -> Option<T>) -> Wait<T> {
        self.write_out(&mut self.writing());
        let mut inbox = self.inbox();
        loop {
            if let Some(found) = want(&mut inbox) {
                // Whoever waits next has to read from now on.
                if !inbox.reading && inbox.waiting > 0 {
                    self.arrived.notify_one();
                }
                return Wait::Done(found);
            }
            if inbox.reading {
                inbox.waiting += 1;
                inbox = self.arrived.wait(inbox).unwrap_or_else(PoisonError::into_inner);
                inbox.waiting -= 1;
                continue;
            }
            inbox.reading = true;
            let mut chunk = std::mem::take(&mut inbox.chunk);
            drop(inbox);
            chunk.resize(READ, 0);
            let read = rustix::io::read(&self.socket, &mut chunk[..]);
            inbox = self.inbox();
            inbox.reading = false;
            let wake = match read {
                Ok(count) if count > 0 => {
                    inbox.buffer.extend_from_slice(&chunk[..count]);
                    inbox.sort()
                }
                // Another may read while this one runs the handlers.
                Err(rustix::io::Errno::INTR) => Wake::Some(1),
                Ok(_) | Err(_) => {
                    inbox.closed = true;
                    Wake::All
                }
            };
            inbox.chunk = chunk;
            // There is no hub to be told.
            inbox.news = News::default();
            self.notify(&inbox, wake);
            if matches!(read, Err(rustix::io::Errno::INTR)) {
                return Wait::Interrupted;
            }
        }
    }

    fn notify(&self, inbox: &Inbox, wake: Wake) {
        match wake {
            _ if inbox.waiting == 0 => {}
            Wake::Some(count) => (0..count).for_each(|_| self.arrived.notify_one()),
            Wake::All => self.arrived.notify_all(),
        }
    }

    fn writing(&self) -> MutexGuard<'_, BytesMut> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame, and those held back before it.
    fn write(&self, py: Python<'_>, frame: &FromChild) -> PyResult<()> {
        self.own_process()?;
        if self.looped {
            frame.encode(&mut self.writing());
            return Ok(());
        }
        if let Some(hub) = self.hub.as_ref().filter(|hub| hub.is_here()) {
            return self.write_at_once(py, hub, frame);
        }
        py.detach(|| {
            let mut out = self.writing();
            frame.encode(&mut out);
            self.write_out(&mut out);
        });
        Ok(())
    }

    /// Writes as much as goes without waiting; the hub sees to the rest, once.
    fn write_at_once(&self, py: Python<'_>, hub: &Hub, frame: &FromChild) -> PyResult<()> {
        let mut out = self.writing();
        // What was held back was not tried yet, so that nobody sees to it.
        let behind = std::mem::replace(&mut self.inbox().behind, true);
        frame.encode(&mut out);
        if behind {
            return Ok(());
        }
        write_some(&self.socket, &mut out);
        let rest = !out.is_empty();
        self.inbox().behind = rest;
        drop(out);
        if rest { hub.behind(py) } else { Ok(()) }
    }

    /// A task that forks and lets both sides return has a twin of its child here, which must not speak for it.
    fn own_process(&self) -> PyResult<()> {
        let here = std::process::id();
        if here == self.pid {
            return Ok(());
        }
        Err(pyo3::exceptions::PyRuntimeError::new_err(format!(
            "process {here} was forked by a task in process {}, whose connection to the worker it cannot use: \
             leave a forked process with os._exit()",
            self.pid
        )))
    }

    /// Writes whole frames. A supervisor that is gone is noticed by the next read.
    fn write_out(&self, out: &mut BytesMut) {
        let mut rest = &out[..];
        while !rest.is_empty() {
            match rustix::io::retry_on_intr(|| send(&self.socket, rest, SendFlags::NOSIGNAL)) {
                Ok(count) => rest = &rest[count..],
                Err(_) => break,
            }
        }
        out.clear();
        // One huge result must not be paid for ever.
        if out.capacity() > 16 * READ {
            *out = BytesMut::new();
        }
    }

    /// Writes a frame with a number of ours and waits for the answer: nothing, or what went wrong.
    fn ask(&self, py: Python<'_>, frame: impl FnOnce(u64) -> FromChild) -> PyResult<Reply<Answer>> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        if self.looped {
            self.write(py, &frame(serial))?;
            return Ok(Reply::Later(serial));
        }
        self.inbox().stored.insert(serial, None);
        self.write(py, &frame(serial))?;
        let answer = self.wait_for(py, serial, |inbox| match inbox.stored.get_mut(&serial)?.take() {
            Some(answer) => Some(answer),
            None => inbox.closed.then(|| Some("the worker is gone".to_owned())),
        });
        self.inbox().stored.remove(&serial);
        answer.map(Reply::Now)
    }

    /// Reads what is there.
    fn receive(&self) {
        let mut inbox = self.inbox();
        let mut chunk = std::mem::take(&mut inbox.chunk);
        chunk.resize(READ, 0);
        loop {
            let read = rustix::io::retry_on_intr(|| recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT));
            match read {
                Ok((count, _)) if count > 0 => inbox.buffer.extend_from_slice(&chunk[..count]),
                Err(rustix::io::Errno::AGAIN) => break,
                Ok(_) | Err(_) => {
                    inbox.closed = true;
                    break;
                }
            }
        }
        inbox.chunk = chunk;
        inbox.sort();
    }

    fn ended(&self, py: Python<'_>, job: u64, outcome: Outcome) -> PyResult<()> {
        self.write(py, &FromChild::Ended { job, outcome })
    }
}

/// Any text that Python can hold; what UTF-8 cannot (lone surrogates) is replaced. It is shown only: what is stored
/// was encoded by Python.
struct Text(String);

impl<'py> FromPyObject<'_, 'py> for Text {
    type Error = PyErr;

    fn extract(object: pyo3::Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(object.cast::<PyString>()?.to_string_lossy().into_owned()))
    }
}

#[pymethods]
impl ChildPipe {
    /// Takes the descriptor over. With a `hub` its thread, which calls this, never waits in here.
    #[new]
    #[pyo3(signature = (fd, *, looped = false, hub = None))]
    fn new(fd: i32, looped: bool, hub: Option<Py<PyAny>>) -> PyResult<Self> {
        if fd < 0 {
            return Err(pyo3::exceptions::PyValueError::new_err("not a descriptor"));
        }
        #[expect(unsafe_code, reason = "the only way to take a descriptor over from Python")]
        // SAFETY: the descriptor was received for this object alone; python/celeriac/zygote.py forgets it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            socket,
            inbox: Mutex::new(Inbox {
                looped: looped.then(ForLoop::default),
                // Where there is a hub only its thread reads.
                reading: hub.is_some(),
                ..Inbox::default()
            }),
            arrived: Condvar::new(),
            writing: Mutex::default(),
            serial: AtomicU64::new(0),
            looped,
            hub: hub.map(Hub::new),
            pid: std::process::id(),
        })
    }

    /// Initialized: takes jobs.
    fn up(&self, py: Python<'_>) -> PyResult<()> {
        self.write(py, &FromChild::Up { pid: self.pid })
    }

    /// The next job, as a tuple, of two items for a call: `(job, pickled)`; the exit status to leave with; or None when the supervisor is gone.
    fn recv<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.own_process()?;
        match self.wait(py, Inbox::next)? {
            Next::Job(job) => Ok(Some(work(py, &job)?)),
            Next::Leave(status) => Ok(Some(status.into_pyobject(py)?.into_any())),
            Next::Closed => Ok(None),
        }
    }

    /// The descriptor, for an event loop to watch.
    fn fileno(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    /// For an event loop: what has come, without waiting. `(jobs, answers to stores, answers to counts, interrupts, exit
    /// status to leave with when all is done)`; None when the supervisor is gone.
    fn collect<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        self.own_process()?;
        self.receive();
        let mut inbox = self.inbox();
        let jobs = inbox.jobs.drain(..).map(|job| job_tuple(py, &job)).collect::<PyResult<Vec<_>>>()?;
        let ForLoop { stored, counted, interrupts } =
            inbox.looped.as_mut().map(std::mem::take).unwrap_or_default();
        if inbox.closed {
            return Ok(None);
        }
        (jobs, stored, counted, interrupts, inbox.leave).into_pyobject(py).map(Some)
    }

    /// Writes the frames that an event loop has kept.
    fn flush_kept(&self, py: Python<'_>) -> PyResult<()> {
        self.own_process()?;
        py.detach(|| self.write_out(&mut self.writing()));
        Ok(())
    }

    /// Reads what is there, for a hub: jobs, numbers of answers, jobs to be ended with the hard limit that each has
    /// passed if it has, the exit status to leave with if it is to, and whether the supervisor is gone.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Taken<'py>> {
        self.own_process()?;
        let mut inbox = self.inbox();
        let mut chunk = std::mem::take(&mut inbox.chunk);
        chunk.resize(READ, 0);
        match read_some(&self.socket, &mut chunk) {
            Some(0) => inbox.closed = true,
            Some(count) => inbox.buffer.extend_from_slice(&chunk[..count]),
            None => {}
        }
        inbox.chunk = chunk;
        inbox.sort();
        self.notify(&inbox, Wake::All);
        let jobs: Vec<Job> = inbox.jobs.drain(..).collect();
        let News { answered, interrupts } = std::mem::take(&mut inbox.news);
        let (leave, closed) = (inbox.leave, inbox.closed);
        drop(inbox);
        let jobs = jobs.iter().map(|job| work(py, job)).collect::<PyResult<_>>()?;
        Ok((jobs, answered, interrupts, leave, closed))
    }

    /// Writes more of what could not be written at once; whether something is left.
    fn flush(&self) -> bool {
        let mut out = self.writing();
        write_some(&self.socket, &mut out);
        let rest = !out.is_empty();
        self.inbox().behind = rest;
        rest
    }

    /// It was ended because it was revoked, or cancelled by a stop.
    fn terminated(&self, py: Python<'_>, job: u64) -> PyResult<()> {
        self.ended(py, job, Outcome::Terminated)
    }

    /// It was ended because it had passed its hard limit.
    fn timed_out(&self, py: Python<'_>, job: u64, limit: f64) -> PyResult<()> {
        self.ended(py, job, Outcome::TimedOut { limit })
    }

    /// The job was decoded and starts.
    fn accepted(&self, py: Python<'_>, job: u64) -> PyResult<()> {
        self.write(py, &FromChild::Accepted { job })
    }

    /// It returned.
    fn succeeded(&self, py: Python<'_>, job: u64, result: Text, runtime: f64) -> PyResult<()> {
        self.ended(py, job, Outcome::Success { result: result.0, runtime })
    }

    /// It raised; the failure is stored.
    fn failed(
        &self,
        py: Python<'_>,
        job: u64,
        exception: Text,
        traceback: Text,
        runtime: f64,
    ) -> PyResult<()> {
        self.ended(py, job, Outcome::Failure { exception: exception.0, traceback: traceback.0, runtime })
    }

    /// It asked to be retried; the new message is sent.
    fn retried(&self, py: Python<'_>, job: u64, exception: Text, traceback: Text) -> PyResult<()> {
        self.ended(py, job, Outcome::Retry { exception: exception.0, traceback: traceback.0 })
    }

    /// It raised `Ignore`.
    fn ignored(&self, py: Python<'_>, job: u64) -> PyResult<()> {
        self.ended(py, job, Outcome::Ignored)
    }

    /// It raised `Reject`.
    fn rejected(
        &self,
        py: Python<'_>,
        job: u64,
        requeue: bool,
        exception: Text,
        traceback: Text,
    ) -> PyResult<()> {
        self.ended(py, job, Outcome::Rejected { requeue, exception: exception.0, traceback: traceback.0 })
    }

    /// The call returned or raised, as this pickled answer says; `lost` when the process leaves for it.
    #[pyo3(signature = (job, value, *, lost = None))]
    fn answered(&self, py: Python<'_>, job: u64, value: &[u8], lost: Option<String>) -> PyResult<()> {
        FromChild::Answered { job, value: Bytes::copy_from_slice(value) }.encode(&mut self.writing());
        let outcome = match lost {
            Some(status) => Outcome::WorkerLost { status },
            None => Outcome::Success { result: String::new(), runtime: 0.0 },
        };
        self.ended(py, job, outcome)
    }

    /// The body could not be decoded.
    fn undecodable(&self, py: Python<'_>, job: u64, reason: Text) -> PyResult<()> {
        self.ended(py, job, Outcome::Undecodable { reason: reason.0 })
    }

    /// The body is no task; without a reason, nothing that was meant to be one.
    #[pyo3(signature = (job, reason))]
    fn malformed(&self, py: Python<'_>, job: u64, reason: Option<Text>) -> PyResult<()> {
        let reason = reason.map(|reason| reason.0);
        self.ended(py, job, Outcome::Malformed { reason })
    }

    /// It was a message of protocol 1; this is what it is in protocol 2.
    fn translated(
        &self,
        py: Python<'_>,
        job: u64,
        headers: String,
        body: &[u8],
        content_type: String,
        content_encoding: String,
    ) -> PyResult<()> {
        let body = Bytes::copy_from_slice(body);
        let headers = Json(headers.into());
        self.ended(py, job, Outcome::Translated { headers, body, content_type, content_encoding })
    }

    /// The task ended this process, which is about to leave.
    fn lost(&self, py: Python<'_>, job: u64, status: Text) -> PyResult<()> {
        self.ended(py, job, Outcome::WorkerLost { status: status.0 })
    }

    /// Has the message of a call published, before the job's result is written and its message settled. With `hold`
    /// it travels with what follows, which is to come at once; with `wait` this returns when the broker has it, or
    /// with what went wrong.
    ///
    /// Raises ValueError for what cannot be said in JSON as Celery says it; then nothing is published.
    #[pyo3(signature = (job, target, task_id, reply_to, args, kwargs, options, *, as_tuple, hold, wait))]
    #[expect(clippy::too_many_arguments, reason = "one argument a part of the call; called from one place")]
    fn go_on(
        &self,
        py: Python<'_>,
        job: u64,
        target: &Target,
        task_id: &str,
        reply_to: &str,
        args: &str,
        kwargs: &str,
        options: &str,
        as_tuple: bool,
        hold: bool,
        wait: bool,
    ) -> PyResult<Reply<Option<String>>> {
        let call = Call { id: task_id, reply_to, args, tuple: as_tuple, kwargs, options };
        let publication = Box::new(target.publication(&call)?);
        if wait {
            let frame = |serial| FromChild::Publish { job, confirm: Some(serial), publication };
            return self.ask(py, frame);
        }
        let frame = FromChild::Publish { job, confirm: None, publication };
        if hold {
            self.own_process()?;
            frame.encode(&mut self.writing());
        } else {
            self.write(py, &frame)?;
        }
        Ok(Reply::Now(None))
    }

    /// Has the job counted as a member of its chord, after its result is written; waits for the answer, which is
    /// the script's. Raises RuntimeError when there is none.
    fn count(
        &self,
        py: Python<'_>,
        job: u64,
        keys: Vec<Vec<u8>>,
        arguments: Vec<Vec<u8>>,
    ) -> PyResult<Reply<Tally>> {
        let bytes = |texts: Vec<Vec<u8>>| texts.into_iter().map(Bytes::from).collect();
        let part = Part { keys: bytes(keys), arguments: bytes(arguments) };
        let serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        if self.looped {
            self.write(py, &FromChild::Part { job, serial, part })?;
            return Ok(Reply::Later(serial));
        }
        self.inbox().stored.insert(serial, None);
        self.write(py, &FromChild::Part { job, serial, part })?;
        let answer = self.wait_for(py, serial, |inbox| {
            if let Some(counted) = inbox.counted.remove(&serial) {
                return Some(Ok(counted));
            }
            match inbox.stored.get_mut(&serial)?.take() {
                Some(error) => Some(Err(error.unwrap_or_default())),
                None => inbox.closed.then(|| Err("the worker is gone".to_owned())),
            }
        });
        self.inbox().stored.remove(&serial);
        answer?.map(|counted| Reply::Now(tally(counted))).map_err(PyRuntimeError::new_err)
    }

    /// Has a result written. With `wait` this returns when it is, or with what went wrong.
    #[pyo3(signature = (job, task_id, state, document, key, expires, content_type, content_encoding, *, wait))]
    #[expect(
        clippy::too_many_arguments,
        reason = "one argument a field of the record; called from one place"
    )]
    fn store(
        &self,
        py: Python<'_>,
        job: u64,
        task_id: Text,
        state: Text,
        document: &[u8],
        key: String,
        expires: Option<f64>,
        content_type: String,
        content_encoding: String,
        wait: bool,
    ) -> PyResult<Reply<Option<String>>> {
        let record = Record {
            task_id: task_id.0,
            state: state.0,
            document: Bytes::copy_from_slice(document),
            key,
            expires: expires.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            content_type,
            content_encoding,
        };
        if !wait {
            // The outcome follows within microseconds: one write, one wake-up of the supervisor for both.
            FromChild::Store { job, confirm: None, record }.encode(&mut self.writing());
            return Ok(Reply::Now(None));
        }
        // Once it leaves, its place in the pool is another's: nobody would answer.
        if job == 0 && self.inbox().leave.is_some() {
            self.write(py, &FromChild::Store { job, confirm: None, record })?;
            return Ok(Reply::Now(None));
        }
        self.ask(py, |serial| FromChild::Store { job, confirm: Some(serial), record })
    }
}

/// Where messages of one task go and what they are like; Celery's own message of an empty call, as JSON.
#[pyclass(frozen, module = "celeriac._core")]
pub(super) struct Target {
    message: signature::Target,
    route: Route,
}

#[derive(serde::Deserialize)]
struct Route {
    exchange: String,
    routing_key: String,
    declare: Option<Queue>,
}

#[pymethods]
impl Target {
    #[new]
    fn new(json: &str) -> PyResult<Self> {
        let wrong = |error: serde_json::Error| PyValueError::new_err(error.to_string());
        Ok(Self {
            message: serde_json::from_str(json).map_err(wrong)?,
            route: serde_json::from_str(json).map_err(wrong)?,
        })
    }

    /// `(headers, properties, body)` of a call: for tests.
    #[pyo3(signature = (task_id, reply_to, args, kwargs, options, *, as_tuple))]
    fn message(
        &self,
        task_id: &str,
        reply_to: &str,
        args: &str,
        kwargs: &str,
        options: &str,
        as_tuple: bool,
    ) -> PyResult<(String, String, String)> {
        let call = Call { id: task_id, reply_to, args, tuple: as_tuple, kwargs, options };
        let message =
            self.message.message(&call).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((text(message.headers.as_bytes()), text(message.properties.as_bytes()), text(&message.body)))
    }
}

impl Target {
    fn publication(&self, call: &Call<'_>) -> PyResult<Publication> {
        let message = self.message.message(call).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let Route { exchange, routing_key, declare } = &self.route;
        Ok(Publication {
            exchange: exchange.clone(),
            exchange_type: None,
            routing_key: routing_key.clone(),
            message,
            declare: declare.clone().map(Arc::new),
        })
    }
}

/// What [`ChildPipe::take`] gives.
type Taken<'py> = (Vec<Bound<'py, PyAny>>, Vec<u64>, Vec<(u64, Option<f64>)>, Option<i32>, bool);

/// A job as a tuple, of two items for a call: `(job, pickled)`.
fn work<'py>(py: Python<'py>, job: &Job) -> PyResult<Bound<'py, PyAny>> {
    match job.work {
        Work::Call => Ok((job.id, PyBytes::new(py, &job.body)).into_pyobject(py)?.into_any()),
        Work::Message => Ok(job_tuple(py, job)?.into_any()),
    }
}

/// `(job, task, id, headers, properties, exchange, routing_key, redelivered, hints, body, content_type,
/// content_encoding, acks_early)`.
fn job_tuple<'py>(py: Python<'py>, job: &Job) -> PyResult<Bound<'py, PyTuple>> {
    let texts = |text: &str| PyString::new(py, text).into_any();
    let bools = |value: bool| PyBool::new(py, value).to_owned().into_any();
    PyTuple::new(
        py,
        [
            job.id.into_pyobject(py)?.into_any(),
            texts(&job.task),
            texts(&job.task_id),
            text(py, job.headers.as_bytes()).into_any(),
            text(py, job.properties.as_bytes()).into_any(),
            texts(&job.info.exchange),
            texts(&job.info.routing_key),
            bools(job.info.redelivered),
            job.hints.bits().into_pyobject(py)?.into_any(),
            PyBytes::new(py, &job.body).into_any(),
            texts(&job.content_type),
            texts(&job.content_encoding),
            bools(job.acks_early),
        ],
    )
}

fn text<'py>(py: Python<'py>, bytes: &[u8]) -> Bound<'py, PyString> {
    PyString::new(py, &String::from_utf8_lossy(bytes))
}
