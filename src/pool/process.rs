//! One place of the pool: forks a child there, serves it until it leaves or dies, and has the next one up before it is
//! worn out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::Instant;

use super::ipc::{FromChild, ToChild, split};
use super::processes::Shared;
use super::slots::Leave;
use super::wear::Weight;
use super::zygote::{Command, Number, Report, Scope, human_status};
use super::{Event, Job, memory};
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

/// What became of a child.
enum End {
    /// It lived, and is dead.
    Dead,
    /// It never came up.
    Failed(Failure),
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
    /// Tells the place to look whether it lacks a child.
    lacking: Arc<Notify>,
    buffer: BytesMut,
    /// Its weight, being found out, and whether no job is given to it meanwhile.
    scale: Option<(JoinHandle<Option<Weight>>, bool)>,
    /// Set once it has been seen off: its place belongs to another.
    leaving_until: Option<Instant>,
    /// The kernel says that the child was gone with something of ours unread.
    unread: bool,
    /// It was killed because it was not up in time.
    overdue: bool,
    /// KILL is on its way; nothing more can be done.
    killed: bool,
    /// It was killed by us for what it wrote.
    outlawed: bool,
}

/// Keeps a child at a place for as long as one is wanted there, and a spare beside it when it will soon be needed.
pub(super) async fn keep(shared: Arc<Shared>, index: u32, events: mpsc::Sender<Event>) {
    let lacking = Arc::new(Notify::new());
    let mut processes = JoinSet::new();
    let mut failures = 0;
    let mut retry_at = None;
    let mut stopping = false;
    loop {
        if retry_at.is_none() && shared.slots().lacks(index) {
            let number = shared.next_number();
            shared.slots().starting(index, number, Instant::now());
            processes.spawn(live(Arc::clone(&shared), index, number, events.clone(), Arc::clone(&lacking)));
            continue;
        }
        if processes.is_empty() && !shared.slots().wanted(index) {
            break;
        }
        tokio::select! {
            Some(end) = processes.join_next() => match outcome(end) {
                End::Dead => failures = 0,
                End::Failed(failure) => {
                    failures += 1;
                    if shared.failed(failure, failures, index) {
                        break;
                    }
                    let wait = back_off(failures, Duration::from_millis(50), Duration::from_secs(5));
                    retry_at = Some(Instant::now() + wait);
                }
                End::NoZygote => break,
            },
            () = lacking.notified() => {}
            () = sleep_until(retry_at) => retry_at = None,
            () = shared.stopping.cancelled(), if !stopping => stopping = true,
        }
    }
    while processes.join_next().await.is_some() {}
    shared.slots().forget(index);
}

/// What a process came to; a panic in its task is one of the place.
fn outcome(end: Result<End, JoinError>) -> End {
    match end.map_err(JoinError::try_into_panic) {
        Ok(end) => end,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // Aborted: only with the place itself.
        Err(Err(_)) => End::NoZygote,
    }
}

/// The whole life of one child.
async fn live(
    shared: Arc<Shared>,
    index: u32,
    number: Number,
    events: mpsc::Sender<Event>,
    lacking: Arc<Notify>,
) -> End {
    let unborn = match fork(&shared, index, number, events, lacking).await {
        Fork::Child(mut process) => return process.serve().await,
        Fork::Refused => End::Failed(Failure::Stillborn),
        Fork::Over => End::NoZygote,
    };
    shared.slots().unborn(index, number);
    unborn
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
async fn fork(
    shared: &Arc<Shared>,
    index: u32,
    number: Number,
    events: mpsc::Sender<Event>,
    lacking: Arc<Notify>,
) -> Fork {
    let (ours, theirs) = match std::os::unix::net::UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => return refused(&error),
    };
    let (sender, mut reports) = mpsc::unbounded_channel();
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
        events,
        lacking,
        buffer: BytesMut::with_capacity(READ),
        scale: None,
        leaving_until: None,
        unread: false,
        overdue: false,
        killed: false,
        outlawed: false,
    }))
}

fn refused(error: &io::Error) -> Fork {
    tracing::error!(target: "celery.pool", "Cannot start a worker process: {error}");
    Fork::Refused
}

impl Process {
    /// Serves the child until it is dead.
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
                    Some(Report::Exited { code, peak }) => return self.dead(code, Some(peak)).await,
                    Some(Report::Signalled) => self.on_signalled().await,
                    Some(Report::Forked { .. } | Report::Failed { .. }) => {}
                    None => {
                        self.dead(-9, None).await;
                        return End::NoZygote;
                    }
                },
                weight = weighed(&mut self.scale) => self.on_weighed(weight).await,
                () = sleep_until(kill_at) => {
                    self.kill();
                    self.killed = true;
                }
            }
            self.weigh().await;
            let (lacks, known) = {
                let slots = self.shared.slots();
                (slots.lacks(self.index), slots.knows(self.index, self.number))
            };
            if lacks {
                self.lacking.notify_one();
            }
            if !known && self.leaving_until.is_none() {
                self.leaving_until = Some(Instant::now() + LEAVING);
            }
        }
    }

    async fn on_signalled(&self) {
        let mut events = Vec::new();
        self.shared.slots().signalled(self.index, self.number, &mut events);
        self.send(events).await;
    }

    /// Begins to weigh the child, where that is due.
    async fn weigh(&mut self) {
        if self.scale.is_some() {
            return;
        }
        let Some((most, held)) = self.shared.slots().to_weigh(self.index, self.number) else { return };
        let pid = self.pid;
        match memory::resident(pid) {
            Some(weight) if weight.kib() > most => {
                // Not here: the kernel walks all pages of the child.
                self.scale = Some((tokio::task::spawn_blocking(move || memory::private(pid)), held));
            }
            weight => self.tell_weight(weight).await,
        }
    }

    async fn on_weighed(&mut self, weight: Option<Weight>) {
        let held = self.scale.take().is_some_and(|(_, held)| held);
        let due = self.shared.slots().to_weigh(self.index, self.number);
        // Its task has ended since it was put on the scale: it is weighed again.
        if held || due.is_none_or(|(_, held)| !held) {
            self.tell_weight(weight).await;
        }
    }

    async fn tell_weight(&self, weight: Option<Weight>) {
        let mut events = Vec::new();
        self.shared.slots().weighed(self.index, self.number, weight, &mut events);
        self.send(events).await;
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
                    self.outlawed = true;
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
    async fn dead(&mut self, code: i32, peak: Option<u32>) -> End {
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
        let (doomed, victims, stillborn) = {
            let mut slots = self.shared.slots();
            let doomed = slots.doomed(self.index, self.number);
            let victims = slots.running(self.index, self.number);
            (doomed, victims, slots.dead(self.index, self.number, code, self.unread, &mut events))
        };
        if !doomed && !matches!(code, 0 | RECYCLED) {
            tracing::error!(
                target: "multiprocessing",
                "Process '{}' pid:{} exited with '{}'",
                self.name(), self.pid, human_status(code)
            );
        }
        if let Some(peak) = peak
            && code == KILLED
            && !(doomed || self.killed || self.outlawed)
        {
            self.tell_killed(peak, &victims);
        }
        self.send(events).await;
        match (stillborn, self.overdue) {
            (false, _) => End::Dead,
            (true, true) => End::Failed(Failure::Overdue),
            (true, false) => End::Failed(Failure::Stillborn),
        }
    }

    /// Somebody else has killed the child: the kernel, for lack of memory, more often than not.
    fn tell_killed(&self, peak: u32, victims: &[String]) {
        let (name, pid) = (self.name(), self.pid);
        let bytes = u64::from(peak) * 1024;
        let task = if victims.is_empty() { "no task".to_owned() } else { victims.join(", ") };
        let (another, limit) = self.shared.killings();
        let limit =
            limit.map_or_else(String::new, |limit| format!(", of {limit} that its control group may have"));
        let why = match another {
            Some(true) => "Out of memory: the kernel killed",
            Some(false) => "Somebody, and not the kernel for lack of memory, killed",
            None => "Somebody, perhaps the kernel for lack of memory, killed",
        };
        tracing::error!(
            target: "celery.pool",
            "{why} process '{name}' pid:{pid} with {task}; it had up to {bytes} bytes resident{limit}."
        );
    }
}

/// Exit code of a child that was killed with SIGKILL.
const KILLED: i32 = -9;

/// Exit code of a child that left to be replaced.
const RECYCLED: i32 = 155;

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

async fn weighed(scale: &mut Option<(JoinHandle<Option<Weight>>, bool)>) -> Option<Weight> {
    match scale {
        Some((weight, _)) => weight.await.ok().flatten(),
        None => std::future::pending().await,
    }
}
