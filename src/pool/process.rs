//! One place of the pool: forks a child there, serves it until it leaves or dies, replaces it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ipc::{FromChild, ToChild, split};
use super::processes::Shared;
use super::slots::{Duty, Leave};
use super::zygote::{Command, Number, Report, Scope, human_status};
use super::{Event, Job};
use crate::error::back_off;

/// A child that was told to leave is killed after this long: its own limit on exit hooks is shorter.
const LEAVING: Duration = Duration::from_secs(15);
/// A child whose socket is closed can do nothing more; it has this long to be gone by itself.
const HUNG_UP: Duration = Duration::from_secs(2);
/// Space for the frames of a burst; larger frames make it grow. A result that waits to be written keeps the whole
/// of it alive.
const READ: usize = 16 * 1024;

/// The way to write to a child. Writing never blocks: what the socket does not take waits in the outbox, which
/// the child's owner empties.
pub(super) struct Link {
    socket: OwnedWriteHalf,
    outbox: Mutex<BytesMut>,
    notify: Notify,
}

impl Link {
    fn new(socket: OwnedWriteHalf) -> Self {
        Self { socket, outbox: Mutex::new(BytesMut::new()), notify: Notify::new() }
    }

    fn outbox(&self) -> MutexGuard<'_, BytesMut> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame, or leaves it to the owner.
    pub(super) fn send(&self, frame: &ToChild) {
        self.post(|outbox| frame.encode(outbox));
    }

    /// Gives the child a job.
    pub(super) fn run(&self, job: &Job) {
        self.post(|outbox| ToChild::encode_run(job, outbox));
    }

    fn post(&self, encode: impl FnOnce(&mut BytesMut)) {
        let mut outbox = self.outbox();
        let waiting = !outbox.is_empty();
        encode(&mut outbox);
        if !waiting {
            self.write(&mut outbox);
        }
        if !outbox.is_empty() {
            self.notify.notify_one();
        }
    }

    /// A socket that is broken takes anything: the child is dead and its owner is about to learn it.
    fn write(&self, outbox: &mut BytesMut) {
        while !outbox.is_empty() {
            match self.socket.try_write(outbox) {
                Ok(count) => outbox.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => outbox.clear(),
            }
        }
    }

    pub(super) fn leave(&self, how: Leave) {
        self.send(&match how {
            Leave::Stop => ToChild::Stop,
            Leave::Recycle => ToChild::Recycle,
        });
        self.wake();
    }

    /// Makes the owner look at the books again.
    pub(super) fn wake(&self) {
        self.notify.notify_one();
    }

    fn has_mail(&self) -> bool {
        !self.outbox().is_empty()
    }

    fn flush(&self) {
        self.write(&mut self.outbox());
    }
}

/// How serving a child ended.
enum End {
    /// It leaves and is to be replaced now.
    Leaving,
    /// It is dead; whether before it was up.
    Dead { stillborn: bool },
    /// The zygote is dead, and every child with it.
    NoZygote,
}

/// A running child.
struct Process {
    shared: Arc<Shared>,
    index: u32,
    number: Number,
    pid: u32,
    socket: OwnedReadHalf,
    link: Arc<Link>,
    reports: mpsc::UnboundedReceiver<Report>,
    events: mpsc::Sender<Event>,
    buffer: BytesMut,
    /// Set once it has been seen off: its place belongs to another.
    leaving_until: Option<Instant>,
    /// The kernel says that the child was gone with something of ours unread.
    unread: bool,
    /// It was killed because it was not up in time.
    overdue: bool,
    /// KILL is on its way; nothing more can be done.
    killed: bool,
}

/// Keeps a child at a place for as long as one is wanted there.
pub(super) async fn keep(shared: Arc<Shared>, index: u32, events: mpsc::Sender<Event>) {
    let mut seen_off = JoinSet::new();
    let mut failures = 0;
    while shared.slots().wanted(index) {
        let failure = match fork(&shared, index, &events).await {
            Fork::Child(mut process) => match process.serve().await {
                End::Leaving => {
                    process.leaving_until = Some(Instant::now() + LEAVING);
                    seen_off.spawn(async move {
                        process.serve().await;
                    });
                    None
                }
                End::Dead { stillborn: false } => None,
                End::Dead { stillborn: true } if process.overdue => Some(Failure::Overdue),
                End::Dead { stillborn: true } => Some(Failure::Stillborn),
                End::NoZygote => break,
            },
            Fork::Refused => Some(Failure::Stillborn),
            Fork::Over => break,
        };
        while seen_off.try_join_next().is_some() {}
        let Some(failure) = failure else {
            failures = 0;
            continue;
        };
        failures += 1;
        if shared.failed(failure, failures) {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(back_off(failures, Duration::from_millis(50), Duration::from_secs(5))) => {}
            () = shared.stopping.cancelled() => {}
        }
    }
    while seen_off.join_next().await.is_some() {}
    shared.slots().forget(index);
}

/// Why a place has no child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It died before it was up, or could not be forked.
    Stillborn,
    /// It was not up in time and was killed.
    Overdue,
}

/// What came of asking for a child.
enum Fork {
    Child(Box<Process>),
    /// There is no memory or process to be had for it now.
    Refused,
    /// There will be none any more.
    Over,
}

/// Asks the zygote for a child.
async fn fork(shared: &Arc<Shared>, index: u32, events: &mpsc::Sender<Event>) -> Fork {
    let number = shared.next_number();
    let (ours, theirs) = match std::os::unix::net::UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => return refused(&error),
    };
    let (sender, mut reports) = mpsc::unbounded_channel();
    shared.slots().starting(index, number);
    let request = Command::Fork {
        number,
        index: shared.shown_index(index),
        looped: shared.looped(),
        socket: OwnedFd::from(theirs),
        reports: sender,
    };
    if shared.commands.send(request).is_err() {
        return Fork::Over;
    }
    let pid = match reports.recv().await {
        Some(Report::Forked { pid }) => pid,
        Some(Report::Failed { errno }) => return refused(&io::Error::from_raw_os_error(errno)),
        Some(Report::Signalled | Report::Exited { .. }) | None => return Fork::Over,
    };
    let stream = ours.set_nonblocking(true).and_then(|()| UnixStream::from_std(ours));
    let (socket, write) = match stream {
        Ok(stream) => stream.into_split(),
        // With its socket closed the child leaves by itself.
        Err(error) => return refused(&error),
    };
    let link = Arc::new(Link::new(write));
    shared.slots().forked(index, number, pid, Arc::clone(&link), Instant::now() + shared.up_within);
    Fork::Child(Box::new(Process {
        shared: Arc::clone(shared),
        index,
        number,
        pid,
        socket,
        link,
        reports,
        events: events.clone(),
        buffer: BytesMut::with_capacity(READ),
        leaving_until: None,
        unread: false,
        overdue: false,
        killed: false,
    }))
}

fn refused(error: &io::Error) -> Fork {
    tracing::error!(target: "celery.pool", "Cannot start a worker process: {error}");
    Fork::Refused
}

impl Process {
    /// Serves the child until it is dead, or until its place is free for another.
    async fn serve(&mut self) -> End {
        let mut hung_up: Option<Instant> = None;
        let mut readable = true;
        let mut stopping = false;
        loop {
            let kill_at = [self.kill_at(), self.leaving_until, hung_up].into_iter().flatten().min();
            let kill_at = kill_at.filter(|_| !self.killed);
            tokio::select! {
                read = self.socket.read_buf(&mut self.buffer), if readable => match read {
                    Ok(count) if count > 0 => self.frames().await,
                    ended => {
                        self.unread |= ended.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset);
                        readable = false;
                        hung_up = Some(Instant::now() + HUNG_UP);
                    }
                },
                _ = self.link.socket.writable(), if self.link.has_mail() => self.link.flush(),
                () = self.link.notify.notified() => self.tell_news().await,
                // There is a deadline from now on.
                () = self.shared.stopping.cancelled(), if !stopping => stopping = true,
                report = self.reports.recv() => match report {
                    Some(Report::Exited { code }) => return self.dead(code).await,
                    Some(Report::Signalled) => self.shared.slots().signalled(self.index, self.number),
                    Some(Report::Forked { .. } | Report::Failed { .. }) => {}
                    None => {
                        self.dead(-9).await;
                        return End::NoZygote;
                    }
                },
                () = sleep_until(kill_at) => {
                    self.kill();
                    self.killed = true;
                }
            }
            if self.leaving_until.is_none()
                && self.shared.slots().duty(self.index, self.number) == Duty::Replace
            {
                return End::Leaving;
            }
        }
    }

    fn name(&self) -> String {
        self.shared.process_name(self.number)
    }

    fn kill_at(&self) -> Option<Instant> {
        let slots = self.shared.slots();
        match self.leaving_until {
            // Not in the books any more, but the deadline of a stop is for all.
            Some(_) => slots.deadline(),
            None => slots.kill_at(self.index, self.number),
        }
    }

    fn kill(&mut self) {
        if self.shared.slots().killed(self.index, self.number) {
            self.overdue = true;
            tracing::error!(
                target: "celery.pool",
                "Timed out waiting for UP message from <ForkProcess({}, started daemon)>",
                self.name()
            );
        }
        self.shared.signal(self.number, 9, Scope::Group);
    }

    /// Reads what is in the buffer. Events go out after the books are right and let go.
    async fn frames(&mut self) {
        let mut events = Vec::new();
        loop {
            let frame = match split(&mut self.buffer) {
                Ok(Some(payload)) => FromChild::decode(payload),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            match frame {
                Ok(frame) => self.shared.slots().frame(self.index, self.number, frame, &mut events),
                Err(error) => {
                    tracing::error!(
                        target: "celery.pool",
                        "Process '{}' pid:{} wrote what is no frame ({error}): killed.",
                        self.name(), self.pid
                    );
                    self.buffer.clear();
                    self.shared.signal(self.number, 9, Scope::Process);
                    break;
                }
            }
        }
        if events.iter().any(|event| matches!(event, Event::Up { .. })) {
            self.shared.up();
        }
        self.send(events).await;
        self.buffer.reserve(READ);
    }

    async fn tell_news(&self) {
        let mut events = Vec::new();
        self.shared.slots().news(self.index, self.number, &mut events);
        self.send(events).await;
    }

    /// The worker may have gone before us: then nobody wants to know.
    async fn send(&self, events: Vec<Event>) {
        for event in events {
            let _ = self.events.send(event).await;
        }
    }

    /// The child is dead: what it wrote is read to the end first, so that an outcome in the pipe wins over the
    /// exit status.
    async fn dead(&mut self, code: i32) -> End {
        // Past the runtime, whose idea of readiness may be older than the last write. Not until end-of-file:
        // a process that the task left behind may hold the socket open.
        let mut bytes = vec![0; READ];
        loop {
            let socket = self.socket.as_ref().as_fd();
            match rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut bytes[..])) {
                Ok(0) => break,
                Ok(count) => self.buffer.extend_from_slice(&bytes[..count]),
                Err(error) => {
                    self.unread |= error == rustix::io::Errno::CONNRESET;
                    break;
                }
            }
        }
        self.frames().await;
        let mut events = Vec::new();
        let (doomed, stillborn) = {
            let mut slots = self.shared.slots();
            let doomed = slots.doomed(self.index, self.number);
            (doomed, slots.dead(self.index, self.number, code, self.unread, &mut events))
        };
        if !doomed && !matches!(code, 0 | RECYCLED) {
            tracing::error!(
                target: "multiprocessing",
                "Process '{}' pid:{} exited with '{}'",
                self.name(), self.pid, human_status(code)
            );
        }
        self.send(events).await;
        End::Dead { stillborn }
    }
}

/// Exit code of a child that left to be replaced.
const RECYCLED: i32 = 155;

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}
