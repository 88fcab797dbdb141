//! The pool of processes against a zygote and children that are played by the test: no Python, real sockets.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use super::ipc::{FromChild, ToChild, split};
use super::processes::start;
use super::zygote::ZygoteHandle;
use super::*;
use crate::protocol::{DeliveryInfo, Json};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the zygote was asked.
#[derive(Debug)]
enum Asked {
    Fork { number: u32, index: u32, socket: UnixStream },
    Signal { number: u32, signal: i32, group: bool },
}

/// The zygote's end of the control socket.
struct FakeZygote {
    control: UnixStream,
}

impl FakeZygote {
    fn new() -> (Self, ZygoteHandle) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        // Something to reap.
        let pid = std::process::Command::new("true").spawn().unwrap().id();
        (Self { control: UnixStream::from_std(ours).unwrap() }, ZygoteHandle { socket: theirs.into(), pid })
    }

    async fn asked(&mut self) -> Asked {
        timeout(PATIENCE, self.next()).await.expect("nothing was asked")
    }

    async fn next(&mut self) -> Asked {
        let mut bytes = [0u8; 13];
        let control = &self.control;
        let (count, socket) = control
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [IoSliceMut::new(&mut bytes)];
                let message = recvmsg(control, &mut parts, &mut ancillary, RecvFlags::empty())?;
                let socket = ancillary.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
                    _ => None,
                });
                Ok((message.bytes, socket))
            })
            .await
            .unwrap();
        assert_eq!(count, 13, "the supervisor has hung up");
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        match bytes[0] {
            1 => {
                let socket = std::os::unix::net::UnixStream::from(socket.unwrap());
                socket.set_nonblocking(true).unwrap();
                Asked::Fork { number: word(1), index: word(5), socket: UnixStream::from_std(socket).unwrap() }
            }
            2 => Asked::Signal { number: word(1), signal: word(9) as i32, group: word(5) == 1 },
            kind => panic!("{kind}"),
        }
    }

    async fn report(&mut self, kind: u8, number: u32, value: i32) {
        let mut bytes = vec![kind];
        bytes.extend(number.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        self.control.write_all(&bytes).await.unwrap();
    }

    async fn forks(&mut self) -> FakeChild {
        self.forks_as(None).await
    }

    /// Forks a child that has this pid, for the kernel to look at.
    async fn forks_as(&mut self, pid: Option<u32>) -> FakeChild {
        match self.asked().await {
            Asked::Fork { number, index, socket } => {
                self.report(1, number, pid.unwrap_or(1000 + number) as i32).await;
                FakeChild { number, index, socket, buffer: BytesMut::new() }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Forks a child that comes up.
    async fn child(&mut self) -> FakeChild {
        let mut child = self.forks().await;
        child.says(FromChild::Up { pid: 1000 + child.number }).await;
        child
    }

    async fn signal(&mut self, child: &FakeChild) -> (i32, bool) {
        match self.asked().await {
            Asked::Signal { number, signal, group } => {
                assert_eq!(number, child.number);
                self.report(3, number, 0).await;
                (signal, group)
            }
            other => panic!("{other:?}"),
        }
    }

    async fn died(&mut self, child: FakeChild, code: i32) {
        let number = child.number;
        drop(child);
        self.report(4, number, code).await;
    }

    async fn hung_up(mut self) {
        let mut rest = Vec::new();
        timeout(PATIENCE, self.control.read_to_end(&mut rest)).await.unwrap().unwrap();
    }
}

struct FakeChild {
    number: u32,
    index: u32,
    socket: UnixStream,
    buffer: BytesMut,
}

impl FakeChild {
    async fn says(&mut self, frame: FromChild) {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        self.socket.write_all(&bytes).await.unwrap();
    }

    async fn ends(&mut self, job: JobId, outcome: Outcome) {
        self.says(FromChild::Ended { job, outcome }).await;
    }

    async fn hears(&mut self) -> ToChild {
        loop {
            if let Some(payload) = split(&mut self.buffer).unwrap() {
                return ToChild::decode(payload).unwrap();
            }
            let read = timeout(PATIENCE, self.socket.read_buf(&mut self.buffer)).await.expect("told nothing");
            assert!(read.unwrap() > 0, "the supervisor has hung up");
        }
    }

    async fn hears_job(&mut self) -> Job {
        match self.hears().await {
            ToChild::Run(job) => *job,
            other => panic!("{other:?}"),
        }
    }
}

fn config(concurrency: u32) -> PoolConfig {
    PoolConfig {
        kind: "prefork".into(),
        concurrency,
        max_tasks_per_child: None,
        max_memory_per_child: None,
        proc_alive_timeout: 60.0,
        loops: 0,
        async_concurrency: 0,
    }
}

fn job(id: JobId) -> Job {
    Job {
        id,
        task: "add".into(),
        task_id: format!("id-{id}"),
        headers: Json::empty(),
        properties: Json::empty(),
        info: DeliveryInfo::default(),
        body: Bytes::from_static(b"[[], {}, {}]"),
        content_type: "application/json".into(),
        content_encoding: "utf-8".into(),
        acks_early: false,
        work: crate::pool::Work::Message,
        hints: crate::pool::Hints::default(),
    }
}

fn success() -> Outcome {
    Outcome::Success { result: "1".into(), runtime: 0.5 }
}

struct Stage {
    zygote: FakeZygote,
    pool: Box<dyn Pool>,
    events: mpsc::Receiver<Event>,
}

impl Stage {
    fn new(config: &PoolConfig) -> Self {
        let (zygote, handle) = FakeZygote::new();
        let Running { pool, events } = start(config, handle, &TaskTracker::new()).unwrap();
        Self { zygote, pool, events }
    }

    async fn event(&mut self) -> Option<Event> {
        loop {
            match timeout(PATIENCE, self.events.recv()).await.expect("no event") {
                Some(Event::Gone(_)) => {}
                event => return event,
            }
        }
    }

    /// Why the next child ended.
    async fn gone(&mut self) -> Gone {
        loop {
            match timeout(PATIENCE, self.events.recv()).await.expect("no event") {
                Some(Event::Gone(why)) => return why,
                Some(_) => {}
                None => panic!("the pool is over"),
            }
        }
    }

    async fn up(&mut self) -> FakeChild {
        let child = self.zygote.child().await;
        assert!(matches!(self.event().await, Some(Event::Up { slot, .. }) if slot == child.index));
        child
    }

    async fn ended(&mut self) -> (JobId, Outcome) {
        match self.event().await {
            Some(Event::Ended { job, outcome }) => (job, outcome),
            other => panic!("{other:?}"),
        }
    }

    async fn down(&mut self) {
        assert!(matches!(self.event().await, Some(Event::Down { .. })));
    }

    /// Polls until the pool says so.
    async fn until(&mut self, what: impl Fn(&dyn Pool) -> bool) {
        timeout(PATIENCE, async {
            while !what(self.pool.as_ref()) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_job_goes_to_an_idle_child_and_its_outcome_comes_back() {
    let mut stage = Stage::new(&config(1));
    assert!(stage.pool.submit(job(1)).is_err(), "no child is up");
    let mut child = stage.up().await;
    assert_eq!(stage.pool.submit(job(1)).unwrap(), (0, 1001));
    assert!(stage.pool.submit(job(2)).is_err(), "the only child is busy");
    assert_eq!(child.hears_job().await.id, 1);
    child.says(FromChild::Accepted { job: 1 }).await;
    child.ends(1, success()).await;
    assert!(matches!(stage.event().await, Some(Event::Accepted { job: 1 })));
    assert_eq!(stage.ended().await, (1, success()));
    assert_eq!(stage.pool.idle(), 1);
}

#[tokio::test]
async fn a_child_that_dies_loses_its_job_once_and_is_replaced_at_its_place() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    stage.zygote.died(child, -9).await;
    assert_eq!(stage.ended().await, (1, Outcome::WorkerLost { status: "signal 9 (SIGKILL)".into() }));
    stage.down().await;
    let next = stage.up().await;
    assert_eq!((next.index, next.number), (0, 2));
}

#[tokio::test]
async fn an_outcome_in_the_pipe_wins_over_the_death_of_its_child() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    child.ends(1, success()).await;
    stage.zygote.died(child, -11).await;
    assert_eq!(stage.ended().await, (1, success()));
    stage.down().await;
    stage.up().await;
}

#[tokio::test]
async fn a_job_that_its_child_never_read_goes_to_the_next() {
    let mut stage = Stage::new(&config(1));
    let child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    stage.pool.submit(job(2)).unwrap_err();
    // Not read: the kernel tells by resetting the connection.
    child.socket.readable().await.unwrap();
    stage.zygote.died(child, -9).await;
    stage.down().await;
    let mut next = stage.up().await;
    assert_eq!(next.hears_job().await.id, 1);
    next.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
}

#[tokio::test]
async fn at_the_hard_limit_a_child_gets_term_then_kill_and_the_job_ends_as_timed_out() {
    let mut stage = Stage::new(&config(1));
    let child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    stage.pool.interrupt(1, Interrupt::HardLimit(2.5));
    assert_eq!(stage.zygote.signal(&child).await, (15, true));
    assert_eq!(stage.zygote.signal(&child).await, (9, true));
    stage.zygote.died(child, -9).await;
    assert_eq!(stage.ended().await, (1, Outcome::TimedOut { limit: 2.5 }));
}

#[tokio::test]
async fn no_job_is_given_out_while_a_soft_limit_is_under_way() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    stage.pool.interrupt(1, Interrupt::SoftLimit);
    let Asked::Signal { signal: 10, group: false, .. } = stage.zygote.asked().await else { panic!() };
    child.hears_job().await;
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
    assert!(stage.pool.submit(job(2)).is_err());
    stage.zygote.report(3, child.number, 0).await;
    assert!(matches!(stage.event().await, Some(Event::Idle { slot: 0 })), "the worker is woken");
    stage.pool.submit(job(2)).unwrap();
}

#[tokio::test]
async fn a_child_that_survived_a_terminate_gets_no_other_job() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    stage.pool.interrupt(1, Interrupt::Terminate(15));
    assert_eq!(stage.zygote.signal(&child).await, (15, false));
    child.hears_job().await;
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
    stage.down().await;
    assert!(matches!(child.hears().await, ToChild::Recycle));
    stage.up().await;
}

#[tokio::test]
async fn a_worn_child_is_replaced_before_it_is_dead() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(2), ..config(1) });
    let mut child = stage.up().await;
    for id in 1..=2 {
        stage.pool.submit(job(id)).unwrap();
        child.hears_job().await;
        child.ends(id, success()).await;
        stage.ended().await;
    }
    stage.down().await;
    assert!(matches!(child.hears().await, ToChild::Recycle));
    let mut next = stage.up().await;
    stage.pool.submit(job(3)).unwrap();
    assert_eq!(next.hears_job().await.id, 3);
    stage.zygote.died(child, 155).await;
    next.ends(3, success()).await;
    assert_eq!(stage.ended().await, (3, success()));
}

#[tokio::test]
async fn a_child_that_runs_its_last_task_has_a_spare_that_takes_over_at_once() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(1), ..config(1) });
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    let mut spare = stage.zygote.child().await;
    assert_eq!((spare.index, spare.number), (0, 2));
    // It is no slot: there is one task at a time.
    stage.until(|pool| pool.pids() == [1001]).await;
    assert!(stage.pool.submit(job(2)).is_err());
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
    stage.down().await;
    assert!(matches!(stage.event().await, Some(Event::Up { slot: 0, pid: 1002 })));
    assert_eq!(stage.pool.submit(job(2)).unwrap(), (0, 1002));
    assert_eq!(spare.hears_job().await.id, 2);
    assert!(matches!(child.hears().await, ToChild::Recycle));
}

#[tokio::test]
async fn a_spare_takes_the_place_of_a_child_that_dies() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(1), ..config(1) });
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    let mut spare = stage.zygote.child().await;
    stage.until(|pool| pool.idle() == 0).await;
    stage.zygote.died(child, -11).await;
    assert_eq!(stage.ended().await, (1, Outcome::WorkerLost { status: "signal 11 (SIGSEGV)".into() }));
    stage.down().await;
    // It may come up before or after.
    assert!(matches!(stage.event().await, Some(Event::Up { slot: 0, pid: 1002 })));
    stage.pool.submit(job(2)).unwrap();
    assert_eq!(spare.hears_job().await.id, 2);
}

#[tokio::test]
async fn a_spare_that_is_not_wanted_any_more_leaves_with_its_child() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(1), ..config(1) });
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    let mut spare = stage.zygote.child().await;
    stage.pool.stop(Instant::now() + PATIENCE);
    assert!(matches!(spare.hears().await, ToChild::Stop));
    assert!(matches!(child.hears().await, ToChild::Stop));
    child.ends(1, success()).await;
    stage.zygote.died(spare, 0).await;
    stage.zygote.died(child, 0).await;
    let mut left = 0;
    while stage.event().await.is_some() {
        left += 1;
    }
    assert_eq!(left, 2, "the slot is gone and the task has ended");
    stage.zygote.hung_up().await;
}

/// A child that the kernel knows: this process.
async fn weighed(most: u64) -> (Stage, FakeChild) {
    let mut stage = Stage::new(&PoolConfig { max_memory_per_child: Some(most), ..config(1) });
    let pid = std::process::id();
    let mut child = stage.zygote.forks_as(Some(pid)).await;
    child.says(FromChild::Up { pid }).await;
    assert!(matches!(stage.event().await, Some(Event::Up { .. })));
    (stage, child)
}

#[tokio::test]
async fn a_child_above_the_memory_limit_is_replaced() {
    let (mut stage, mut child) = weighed(100).await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    child.ends(1, success()).await;
    stage.ended().await;
    stage.down().await;
    assert!(matches!(child.hears().await, ToChild::Recycle));
    assert_eq!(stage.up().await.number, 2);
}

#[tokio::test]
async fn a_child_below_the_memory_limit_goes_on() {
    let (mut stage, mut child) = weighed(1 << 40).await;
    for id in 1..=3 {
        stage.pool.submit(job(id)).unwrap();
        assert_eq!(child.hears_job().await.id, id);
        child.ends(id, success()).await;
        assert_eq!(stage.ended().await, (id, success()));
        // While it is weighed there is no slot; that there is one again is told, or the worker would sleep.
        assert!(matches!(stage.event().await, Some(Event::Idle { slot: 0 })));
    }
}

#[tokio::test]
async fn a_child_that_passes_the_memory_limit_in_a_task_ends_it_and_has_a_spare() {
    let (mut stage, mut child) = weighed(100).await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    let mut spare = stage.zygote.child().await;
    stage.until(|pool| pool.idle() == 0).await;
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
    stage.down().await;
    assert!(matches!(stage.event().await, Some(Event::Up { slot: 0, .. })));
    assert!(matches!(child.hears().await, ToChild::Recycle));
    stage.pool.submit(job(2)).unwrap();
    assert_eq!(spare.hears_job().await.id, 2);
}

#[tokio::test]
async fn stopping_waits_for_the_running_job_and_then_closes_the_events() {
    let mut stage = Stage::new(&config(2));
    let (mut one, mut two) = (stage.up().await, stage.up().await);
    stage.pool.submit(job(1)).unwrap();
    let (busy, idle) = if one.index == 1 { (&mut one, &mut two) } else { (&mut two, &mut one) };
    assert_eq!(busy.hears_job().await.id, 1);
    stage.pool.stop(Instant::now() + PATIENCE);
    assert!(matches!(idle.hears().await, ToChild::Stop));
    assert!(matches!(busy.hears().await, ToChild::Stop));
    assert!(stage.pool.submit(job(2)).is_err());
    busy.ends(1, success()).await;
    let mut ended = None;
    for _ in 0..3 {
        if let Some(Event::Ended { job, outcome }) = stage.event().await {
            ended = Some((job, outcome));
        }
    }
    assert_eq!(ended, Some((1, success())));
    stage.zygote.died(one, 0).await;
    stage.zygote.died(two, 0).await;
    assert!(stage.event().await.is_none());
    stage.zygote.hung_up().await;
}

#[tokio::test]
async fn at_the_deadline_of_a_stop_what_still_runs_is_killed() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    stage.pool.stop(Instant::now() + Duration::from_millis(50));
    assert_eq!(stage.zygote.signal(&child).await, (9, true));
    stage.zygote.died(child, -9).await;
    stage.down().await;
    assert_eq!(stage.ended().await, (1, Outcome::WorkerLost { status: "signal 9 (SIGKILL)".into() }));
    assert!(stage.event().await.is_none());
}

#[tokio::test]
async fn a_child_that_does_not_come_up_is_killed_and_replaced() {
    let mut stage = Stage::new(&PoolConfig { proc_alive_timeout: 0.2, ..config(2) });
    let _well = stage.up().await;
    let slow = stage.zygote.forks().await;
    assert_eq!(stage.zygote.signal(&slow).await, (9, true));
    stage.zygote.died(slow, -9).await;
    let next = stage.up().await;
    assert_eq!(next.number, 3);
}

#[tokio::test]
async fn a_first_child_that_is_only_slow_is_given_another_chance() {
    let mut stage = Stage::new(&PoolConfig { proc_alive_timeout: 0.1, ..config(1) });
    let slow = stage.zygote.forks().await;
    assert_eq!(stage.zygote.signal(&slow).await, (9, true));
    stage.zygote.died(slow, -9).await;
    assert_eq!(stage.up().await.number, 2);
}

#[tokio::test]
async fn a_child_that_cannot_be_forked_now_is_asked_for_again() {
    let mut stage = Stage::new(&config(1));
    let child = stage.up().await;
    stage.zygote.died(child, -9).await;
    stage.down().await;
    let Asked::Fork { number, .. } = stage.zygote.asked().await else { panic!() };
    stage.zygote.report(2, number, 12).await;
    assert_eq!(stage.up().await.number, number + 1);
}

#[tokio::test]
async fn a_thousand_children_can_be_asked_for_before_one_is_forked() {
    let mut stage = Stage::new(&config(1000));
    let mut children = Vec::new();
    for _ in 0..1000 {
        children.push(stage.zygote.forks().await);
    }
    for child in &mut children {
        child.says(FromChild::Up { pid: 1 }).await;
        assert!(matches!(stage.event().await, Some(Event::Up { .. })));
    }
    assert_eq!(stage.pool.idle(), 1000);
}

#[tokio::test]
async fn a_pool_whose_first_child_dies_before_it_is_up_is_broken() {
    let mut stage = Stage::new(&config(1));
    let child = stage.zygote.forks().await;
    stage.zygote.died(child, 1).await;
    match stage.event().await {
        Some(Event::Broken(why)) => assert_eq!(why, "Could not start worker processes"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn with_the_zygote_all_jobs_are_lost_and_the_worker_has_to_end() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    drop(stage.zygote);
    drop(child);
    let mut lost = false;
    loop {
        match timeout(PATIENCE, stage.events.recv()).await.unwrap() {
            Some(Event::Ended { job: 1, outcome: Outcome::WorkerLost { .. } }) => lost = true,
            Some(Event::Broken(why)) => {
                assert!(why.contains("zygote"), "{why}");
                break;
            }
            Some(Event::Down { .. } | Event::Gone(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(lost);
    assert!(timeout(PATIENCE, stage.events.recv()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_pool_grows_and_shrinks_by_places() {
    let mut stage = Stage::new(&config(1));
    let _one = stage.up().await;
    stage.pool.grow(1);
    assert_eq!(stage.pool.capacity(), 2);
    let mut two = stage.up().await;
    assert_eq!(two.index, 1);
    stage.pool.shrink(1);
    assert_eq!(stage.pool.capacity(), 1);
    assert!(matches!(two.hears().await, ToChild::Stop));
    stage.down().await;
    stage.zygote.died(two, 0).await;
    stage.until(|pool| pool.pids() == [1001]).await;
    stage.pool.grow(1);
    assert_eq!(stage.up().await.index, 1);
}

#[tokio::test]
async fn a_pool_that_is_dropped_leaves_nothing_behind() {
    let mut stage = Stage::new(&config(1));
    let child = stage.up().await;
    drop(stage.pool);
    assert_eq!(stage.zygote.signal(&child).await, (9, true));
    stage.zygote.died(child, -9).await;
    stage.zygote.hung_up().await;
}

#[tokio::test]
async fn a_child_that_writes_no_frames_is_killed() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    child.socket.write_all(&[0xff; 64]).await.unwrap();
    assert_eq!(stage.zygote.signal(&child).await, (9, false));
    stage.zygote.died(child, -9).await;
    stage.down().await;
    stage.up().await;
}

#[tokio::test]
async fn threads_are_slots_of_one_child() {
    let mut stage = Stage::new(&PoolConfig { kind: "threads".into(), ..config(3) });
    let mut child = stage.zygote.child().await;
    for slot in 0..3 {
        assert!(matches!(stage.event().await, Some(Event::Up { slot: up, .. }) if up == slot));
    }
    for id in 1..=3 {
        stage.pool.submit(job(id)).unwrap();
        assert_eq!(child.hears_job().await.id, id);
    }
    assert!(stage.pool.submit(job(4)).is_err());
    child.ends(2, success()).await;
    assert_eq!(stage.ended().await, (2, success()));
    stage.pool.submit(job(4)).unwrap();
    child.hears_job().await;
    stage.zygote.died(child, 1).await;
    let mut lost = Vec::new();
    for _ in 0..3 {
        lost.push(stage.ended().await.0);
    }
    lost.sort_unstable();
    assert_eq!(lost, [1, 3, 4]);
}

#[tokio::test]
async fn one_greenlet_of_many_is_ended_by_a_frame_and_its_slot_is_free_again() {
    let mut stage = Stage::new(&PoolConfig { kind: "gevent".into(), ..config(2) });
    let mut child = stage.zygote.child().await;
    for _ in 0..2 {
        assert!(matches!(stage.event().await, Some(Event::Up { .. })));
    }
    for id in 1..=2 {
        stage.pool.submit(job(id)).unwrap();
        child.hears_job().await;
    }
    for (how, limit) in [
        (Interrupt::HardLimit(2.5), Some(2.5)),
        (Interrupt::SoftLimit, None),
        (Interrupt::Terminate(9), None),
    ] {
        stage.pool.interrupt(1, how);
        if how == Interrupt::SoftLimit {
            continue;
        }
        match child.hears().await {
            ToChild::Interrupt { job: 1, limit: told } => assert_eq!(told, limit),
            other => panic!("{other:?}"),
        }
    }
    child.ends(1, Outcome::Terminated).await;
    assert_eq!(stage.ended().await, (1, Outcome::Terminated));
    stage.pool.submit(job(3)).unwrap();
    assert_eq!(child.hears_job().await.id, 3);
}

#[tokio::test]
async fn a_pool_of_greenlets_grows_and_shrinks_in_its_one_child() {
    let mut stage = Stage::new(&PoolConfig { kind: "eventlet".into(), ..config(2) });
    let mut child = stage.zygote.child().await;
    for _ in 0..2 {
        assert!(matches!(stage.event().await, Some(Event::Up { .. })));
    }
    stage.pool.grow(2);
    assert_eq!((stage.pool.capacity(), stage.pool.idle()), (4, 4));
    for id in 1..=3 {
        stage.pool.submit(job(id)).unwrap();
        child.hears_job().await;
    }
    // The idle one first, then two that run: their jobs end, and no others come.
    stage.pool.shrink(3);
    assert_eq!((stage.pool.capacity(), stage.pool.idle()), (1, 0));
    for id in 1..=3 {
        child.ends(id, success()).await;
        assert_eq!(stage.ended().await.0, id);
    }
    assert_eq!(stage.pool.idle(), 1);
    stage.pool.grow(1);
    assert_eq!((stage.pool.capacity(), stage.pool.idle()), (2, 2));
    // The next child has as many.
    stage.zygote.died(child, -9).await;
    for _ in 0..4 {
        assert!(matches!(stage.event().await, Some(Event::Down { .. })));
    }
    let _next = stage.zygote.child().await;
    for _ in 0..4 {
        assert!(matches!(stage.event().await, Some(Event::Up { .. })));
    }
    assert_eq!((stage.pool.capacity(), stage.pool.idle()), (2, 2));
}

#[tokio::test]
async fn a_child_that_waits_for_a_store_is_answered() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    child.hears_job().await;
    let record = crate::backend::Record {
        task_id: "id-1".into(),
        state: "SUCCESS".into(),
        document: Bytes::from_static(b"{}"),
        key: "k".into(),
        expires: None,
        content_type: "application/json".into(),
        content_encoding: "utf-8".into(),
    };
    child.says(FromChild::Store { job: 1, confirm: Some(7), record }).await;
    let Some(Event::Store { job: 1, confirm: Some(store), .. }) = stage.event().await else { panic!() };
    stage.pool.stored(store, Some("full".into()));
    match child.hears().await {
        ToChild::Stored { serial: 7, error: Some(error) } => assert_eq!(error, "full"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_job_larger_than_the_socket_takes_at_once_arrives_whole() {
    let mut stage = Stage::new(&config(1));
    let mut child = stage.up().await;
    let body = Bytes::from(vec![b'x'; 8 << 20]);
    stage.pool.submit(Job { body: body.clone(), ..job(1) }).unwrap();
    let got = child.hears_job().await;
    assert!(got.body == body);
    assert_eq!(got.body.remaining(), body.len());
}

#[tokio::test]
async fn the_deadline_of_a_stop_is_also_that_of_a_child_that_leaves_already() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(1), ..config(1) });
    let mut worn = stage.up().await;
    stage.pool.submit(job(1)).unwrap();
    worn.hears_job().await;
    worn.ends(1, success()).await;
    stage.ended().await;
    stage.down().await;
    let next = stage.up().await;
    stage.pool.stop(Instant::now() + Duration::from_millis(50));
    let mut signalled = Vec::new();
    for _ in 0..2 {
        let Asked::Signal { number, signal: 9, .. } = stage.zygote.asked().await else { panic!() };
        stage.zygote.report(3, number, 0).await;
        signalled.push(number);
    }
    signalled.sort_unstable();
    assert_eq!(signalled, [worn.number, next.number]);
    stage.zygote.died(worn, -9).await;
    stage.zygote.died(next, -9).await;
    stage.down().await;
    assert!(stage.event().await.is_none());
}

#[tokio::test]
async fn it_is_told_why_a_child_ended_once_and_not_of_those_that_were_told_to_go() {
    let (mut stage, mut heavy) = weighed(100).await;
    stage.pool.submit(job(1)).unwrap();
    heavy.hears_job().await;
    heavy.ends(1, success()).await;
    assert_eq!(stage.gone().await, Gone::Memory);
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(2), ..config(1) });
    let mut worn = stage.up().await;
    for id in 1..=2 {
        stage.pool.submit(job(id)).unwrap();
        worn.hears_job().await;
        worn.ends(id, success()).await;
        stage.ended().await;
    }
    assert_eq!(stage.gone().await, Gone::Tasks);
    let late = stage.up().await;
    stage.zygote.died(worn, 155).await;
    stage.pool.submit(job(4)).unwrap();
    stage.pool.interrupt(4, Interrupt::HardLimit(2.5));
    stage.zygote.signal(&late).await;
    stage.zygote.died(late, -15).await;
    assert_eq!(stage.gone().await, Gone::TimeLimit);
    let revoked = stage.up().await;
    stage.pool.submit(job(5)).unwrap();
    stage.pool.interrupt(5, Interrupt::Terminate(15));
    stage.zygote.signal(&revoked).await;
    stage.zygote.died(revoked, -15).await;
    assert_eq!(stage.gone().await, Gone::Terminated);
    let killed = stage.up().await;
    stage.zygote.died(killed, -9).await;
    assert_eq!(stage.gone().await, Gone::Lost);
    let unborn = stage.zygote.forks().await;
    stage.zygote.died(unborn, 1).await;
    assert_eq!(stage.gone().await, Gone::Stillborn);
    let last = stage.up().await;
    stage.pool.stop(Instant::now() + PATIENCE);
    stage.zygote.died(last, 0).await;
    while let Some(event) = timeout(PATIENCE, stage.events.recv()).await.unwrap() {
        assert!(!matches!(event, Event::Gone(_)), "{event:?}");
    }
}

// --- event loops ---

fn loops(count: u32, lanes: u32) -> PoolConfig {
    PoolConfig { loops: count, async_concurrency: lanes, ..config(0) }
}

async fn loop_up(stage: &mut Stage) -> FakeChild {
    let child = stage.zygote.child().await;
    assert!(matches!(stage.event().await, Some(Event::Up { .. })), "told once for all its slots");
    child
}

#[tokio::test]
async fn a_loop_runs_many_jobs_and_an_interrupt_reaches_one_of_them() {
    let mut stage = Stage::new(&loops(1, 3));
    let mut child = loop_up(&mut stage).await;
    assert_eq!((stage.pool.idle(), stage.pool.idle_loops(), stage.pool.loop_slots()), (0, 3, 3));
    for id in 1..=3 {
        stage.pool.submit_to_loop(job(id)).unwrap();
        assert_eq!(child.hears_job().await.id, id);
    }
    stage.pool.submit_to_loop(job(4)).unwrap_err();
    child.ends(3, success()).await;
    assert_eq!(stage.ended().await, (3, success()));
    stage.pool.interrupt(1, Interrupt::SoftLimit);
    assert!(matches!(child.hears().await, ToChild::Cancel { job: 1, soft: true }));
    assert_eq!(stage.pool.idle_loops(), 1, "a soft limit holds nothing back");
    stage.pool.interrupt(2, Interrupt::HardLimit(2.5));
    assert!(matches!(child.hears().await, ToChild::Cancel { job: 2, soft: false }));
    assert_eq!(stage.pool.idle_loops(), 0, "what is given now might die with the child");
    child.ends(2, Outcome::Terminated).await;
    assert_eq!(stage.ended().await, (2, Outcome::TimedOut { limit: 2.5 }));
    assert_eq!(stage.pool.idle_loops(), 2);
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
}

#[tokio::test]
async fn a_job_that_does_not_end_takes_its_loop_along_and_each_job_is_accounted_for() {
    let mut stage = Stage::new(&loops(1, 3));
    let mut child = loop_up(&mut stage).await;
    for id in 1..=3 {
        stage.pool.submit_to_loop(job(id)).unwrap();
        child.hears_job().await;
    }
    stage.pool.interrupt(2, Interrupt::Terminate(15));
    assert_eq!(stage.zygote.signal(&child).await, (9, true));
    stage.zygote.died(child, -9).await;
    let mut ended = vec![stage.ended().await, stage.ended().await, stage.ended().await];
    ended.sort_by_key(|(id, _)| *id);
    let lost = || Outcome::WorkerLost { status: "signal 9 (SIGKILL)".into() };
    assert_eq!(ended, [(1, lost()), (2, Outcome::Terminated), (3, lost())]);
    stage.down().await;
    loop_up(&mut stage).await;
}

#[tokio::test]
async fn a_worn_loop_is_given_its_last_job_and_then_ends_all_of_them() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(2), ..loops(1, 3) });
    let mut child = loop_up(&mut stage).await;
    for id in 1..=2 {
        stage.pool.submit_to_loop(job(id)).unwrap();
        assert_eq!(child.hears_job().await.id, id);
    }
    stage.pool.submit_to_loop(job(3)).unwrap_err();
    assert!(matches!(child.hears().await, ToChild::Recycle));
    stage.down().await;
    for id in 1..=2 {
        child.ends(id, success()).await;
        assert_eq!(stage.ended().await, (id, success()));
    }
    let mut next = loop_up(&mut stage).await;
    stage.pool.submit_to_loop(job(3)).unwrap();
    assert_eq!(next.hears_job().await.id, 3);
}

#[tokio::test]
async fn a_loop_has_a_spare_that_takes_over_when_all_that_it_runs_has_ended() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(2), ..loops(1, 3) });
    let mut child = loop_up(&mut stage).await;
    for id in 1..=2 {
        stage.pool.submit_to_loop(job(id)).unwrap();
    }
    assert_eq!(stage.gone().await, Gone::Tasks);
    // It comes up while they run, and waits.
    let mut spare = stage.zygote.child().await;
    for id in 1..=2 {
        assert_eq!(stage.pool.idle_loops(), 0);
        child.ends(id, success()).await;
        assert_eq!(stage.ended().await, (id, success()));
    }
    let slot = loops::FIRST_PLACE * 3;
    assert!(matches!(stage.event().await, Some(Event::Up { slot: up, pid: 1002 }) if up == slot));
    assert_eq!(stage.pool.idle_loops(), 3);
    stage.pool.submit_to_loop(job(3)).unwrap();
    assert_eq!(spare.hears_job().await.id, 3);
}

#[tokio::test]
async fn a_job_that_a_loop_never_read_counts_for_the_loop_that_it_goes_to() {
    let mut stage = Stage::new(&PoolConfig { max_tasks_per_child: Some(2), ..loops(1, 3) });
    let child = loop_up(&mut stage).await;
    stage.pool.submit_to_loop(job(1)).unwrap();
    child.socket.readable().await.unwrap();
    stage.zygote.died(child, -9).await;
    stage.down().await;
    let mut next = loop_up(&mut stage).await;
    assert_eq!(next.hears_job().await.id, 1);
    assert_eq!(stage.pool.idle_loops(), 2);
    stage.pool.submit_to_loop(job(2)).unwrap();
    assert_eq!(next.hears_job().await.id, 2);
    assert!(matches!(next.hears().await, ToChild::Recycle));
    assert_eq!(stage.pool.idle_loops(), 0);
}

/// A loop that the kernel knows: this process.
async fn weighed_loop(most: u64) -> (Stage, FakeChild) {
    let mut stage = Stage::new(&PoolConfig { max_memory_per_child: Some(most), ..loops(1, 3) });
    let pid = std::process::id();
    let mut child = stage.zygote.forks_as(Some(pid)).await;
    child.says(FromChild::Up { pid }).await;
    assert!(matches!(stage.event().await, Some(Event::Up { .. })));
    (stage, child)
}

#[tokio::test]
async fn a_loop_above_the_memory_limit_is_given_no_more_and_ends_what_it_runs() {
    let (mut stage, mut child) = weighed_loop(100).await;
    for id in 1..=2 {
        stage.pool.submit_to_loop(job(id)).unwrap();
        assert_eq!(child.hears_job().await.id, id);
    }
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
    assert_eq!(stage.gone().await, Gone::Memory);
    assert!(matches!(child.hears().await, ToChild::Recycle));
    assert_eq!(stage.pool.idle_loops(), 0);
    let mut spare = stage.zygote.child().await;
    child.ends(2, success()).await;
    assert_eq!(stage.ended().await, (2, success()));
    assert!(matches!(stage.event().await, Some(Event::Up { pid: 1002, .. })));
    stage.pool.submit_to_loop(job(3)).unwrap();
    assert_eq!(spare.hears_job().await.id, 3);
}

#[tokio::test]
async fn a_loop_below_the_memory_limit_has_all_its_slots_again_when_it_was_weighed() {
    let (mut stage, mut child) = weighed_loop(1 << 40).await;
    for id in 1..=2 {
        stage.pool.submit_to_loop(job(id)).unwrap();
    }
    stage.pool.interrupt(1, Interrupt::HardLimit(2.5));
    child.ends(1, Outcome::Terminated).await;
    assert_eq!(stage.ended().await, (1, Outcome::TimedOut { limit: 2.5 }));
    assert!(matches!(stage.event().await, Some(Event::Idle { .. })), "told once for all of them");
    assert_eq!(stage.pool.idle_loops(), 2);
    child.ends(2, success()).await;
    assert_eq!(stage.ended().await, (2, success()));
    assert!(matches!(stage.event().await, Some(Event::Idle { .. })));
    assert_eq!(stage.pool.idle_loops(), 3);
}

#[tokio::test]
async fn a_loop_is_replaced_with_all_others_when_the_pool_is_restarted() {
    let mut stage = Stage::new(&loops(1, 3));
    let mut child = loop_up(&mut stage).await;
    stage.pool.submit_to_loop(job(1)).unwrap();
    assert_eq!(child.hears_job().await.id, 1);
    stage.pool.restart(Reload::default()).unwrap();
    assert!(matches!(child.hears().await, ToChild::Recycle));
    stage.down().await;
    child.ends(1, success()).await;
    assert_eq!(stage.ended().await, (1, success()));
}
