//! The worker's core between a broker in memory and a pool that the test plays: what is told to the broker, when.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use celeriac::backend::{BackendConfig, Record, ResultBackend};
use celeriac::broker::memory::MemoryBroker;
use celeriac::broker::topology::Queue;
use celeriac::broker::{
    Broker, BrokerConfig, Capabilities, Command, Consume, Event, Publication, Session, Settlement,
};
use celeriac::clock;
use celeriac::cluster::ClusterConfig;
use celeriac::config::{Config, ShutdownConfig, TaskPolicy};
use celeriac::error::{BackendError, BrokerError, Error};
use celeriac::pool::{Interrupt, Outcome, PoolConfig, StoreId};
use celeriac::protocol::{DeliveryInfo, Json, Message};
use celeriac::worker::hooks::{Hooks, Incident, LogRecord, Notice, Report, Unstarted};
use celeriac::worker::told::{Account, Became};
use celeriac::worker::{self, Exit, Parts};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::broker::message;
use crate::support::pool::{Driver, scripted};
use crate::support::{unique, wait_until};

/// Remembers what it is asked; answers reports with `answer`.
#[derive(Default)]
struct Recorder {
    incidents: Mutex<Vec<Incident>>,
    notices: Mutex<Vec<Notice>>,
    unstarted: Mutex<Vec<Unstarted>>,
    answer: Option<Settlement>,
}

#[async_trait]
impl Hooks for Recorder {
    fn notice(&self, notice: Notice) {
        self.notices.lock().unwrap().push(notice);
    }

    fn log(&self, _record: LogRecord) {}

    fn wants_received(&self) -> bool {
        false
    }

    async fn received(&self, _message: &Message, _info: &DeliveryInfo) {}

    async fn report(&self, report: Report) -> Account {
        self.incidents.lock().unwrap().push(report.what);
        Account { settlement: self.answer, became: Became::Untold }
    }

    async fn store_revoked(&self, tasks: Vec<Unstarted>) {
        self.unstarted.lock().unwrap().extend(tasks);
    }

    async fn control(&self, _method: &str, _arguments: Value) -> Option<Value> {
        None
    }
}

/// A backend that writes only what it has permits for.
struct Gated {
    gate: Semaphore,
    written: Mutex<Vec<Record>>,
}

#[async_trait]
impl ResultBackend for Gated {
    fn address(&self) -> String {
        "gated://".to_owned()
    }

    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        for record in records {
            self.gate.acquire().await.unwrap().forget();
            self.written.lock().unwrap().push(record.clone());
        }
        records.iter().map(|_| Ok(())).collect()
    }

    async fn get(&self, _task_id: &str) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }
}

/// A worker under test.
pub(crate) struct Bench {
    pub(crate) broker: MemoryBroker,
    hooks: Arc<Recorder>,
    backend: Arc<Gated>,
    pub(crate) pool: Driver,
    /// What the broker does with publications, and the permits of those that wait.
    pub(crate) moods: (Arc<Mutex<VecDeque<Act>>>, Arc<Semaphore>),
    stop: CancellationToken,
    worker: JoinHandle<Result<Exit, Error>>,
}

pub(crate) const QUEUE: &str = "celery";

impl Bench {
    async fn start(policy: TaskPolicy, slots: usize, answer: Option<Settlement>) -> Self {
        Self::start_as(policy, slots, answer, [], |_| {}).await
    }

    async fn start_with(
        policy: TaskPolicy,
        slots: usize,
        answer: Option<Settlement>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        Self::start_as(policy, slots, answer, [], change).await
    }

    async fn start_on(
        policy: TaskPolicy,
        slots: usize,
        answer: Option<Settlement>,
        acts: impl IntoIterator<Item = Act>,
    ) -> Self {
        Self::start_as(policy, slots, answer, acts, |_| {}).await
    }

    pub(crate) async fn start_as(
        policy: TaskPolicy,
        slots: usize,
        answer: Option<Settlement>,
        acts: impl IntoIterator<Item = Act>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let url = format!("memory://{}", unique("worker"));
        let broker = MemoryBroker::open(&url);
        let (running, pool) = scripted(slots).await;
        let hooks = Arc::new(Recorder { answer, ..Recorder::default() });
        let backend = Arc::new(Gated { gate: Semaphore::new(0), written: Mutex::default() });
        let stop = CancellationToken::new();
        let moods = (Arc::new(Mutex::new(acts.into_iter().collect())), Arc::new(Semaphore::new(0)));
        let moody = Moody { inner: MemoryBroker::open(&url), acts: moods.0.clone(), gate: moods.1.clone() };
        let parts = Parts {
            brokers: vec![Arc::new(moody)],
            backend: Some(backend.clone()),
            pool: running,
            hooks: hooks.clone(),
            stop: stop.clone(),
            signals: false,
        };
        let mut config = config(url, policy, slots);
        change(&mut config);
        #[expect(clippy::disallowed_methods, reason = "the bench owns it and awaits its end")]
        let worker = tokio::spawn(worker::run(config, parts));
        Self { broker, hooks, backend, pool, moods, stop, worker }
    }

    pub(crate) fn send(&self, id: &str) {
        self.broker.publish(QUEUE, message(id));
    }

    fn send_with(&self, id: &str, headers: &Value) {
        let mut message = message(id);
        let mut all = message.headers.value().unwrap();
        for (name, value) in headers.as_object().unwrap() {
            all[name] = value.clone();
        }
        message.headers = Json::of(&all);
        self.broker.publish(QUEUE, message);
    }

    pub(crate) async fn settled(&self) {
        wait_until("everything is settled", async || {
            self.broker.unsettled() == 0 && self.broker.waiting(QUEUE) == 0
        })
        .await;
    }

    async fn incident(&self) -> Incident {
        wait_until("an incident is reported", async || !self.hooks.incidents.lock().unwrap().is_empty())
            .await;
        self.hooks.incidents.lock().unwrap().remove(0)
    }

    pub(crate) async fn stop(self) -> Exit {
        self.stop.cancel();
        self.worker.await.unwrap().unwrap()
    }
}

pub(crate) fn config(url: String, policy: TaskPolicy, slots: usize) -> Config {
    Config {
        app_has_stats: false,
        hostname: "celery@tests".to_owned(),
        broker: BrokerConfig {
            urls: vec![url],
            transport_options: serde_json::Map::new(),
            use_ssl: Value::Null,
            heartbeat: None,
            connection_timeout: None,
            retry: true,
            retry_on_startup: true,
            max_retries: None,
            failover_strategy: None,
            login_method: None,
        },
        queues: vec![Queue::named(QUEUE)],
        backend: BackendConfig::default(),
        pool: PoolConfig {
            kind: "scripted".to_owned(),
            concurrency: u32::try_from(slots).unwrap(),
            max_tasks_per_child: None,
            max_memory_per_child: None,
            proc_alive_timeout: 4.0,
            loops: 0,
            async_concurrency: 0,
        },
        prefetch_multiplier: 4,
        disable_prefetch: false,
        eta_task_limit: None,
        rate_limits: true,
        autoscale: None,
        revoked: Vec::new(),
        clock: 0,
        tasks: HashMap::from([("tasks.add".to_owned(), policy)]),
        accept_content: vec!["application/json".to_owned()],
        timezone: "UTC".to_owned(),
        time_limit: None,
        soft_time_limit: None,
        shutdown: ShutdownConfig::default(),
        control: None,
        heartbeat: None,
        heartbeat_signal: false,
        events: None,
        cluster: ClusterConfig::default(),
        lines: None,
        log_tasks: false,
        http: None,
        rungs: Vec::new(),
        rung_tasks: Vec::new(),
        log_info: true,
        log_debug: false,
    }
}

fn early() -> TaskPolicy {
    TaskPolicy { acks_on_failure: true, acks_on_timeout: true, ..TaskPolicy::default() }
}

fn late() -> TaskPolicy {
    TaskPolicy { acks_late: true, ..early() }
}

fn record(id: &str) -> Record {
    Record {
        task_id: id.to_owned(),
        state: "SUCCESS".to_owned(),
        document: Bytes::from_static(b"{}"),
        key: String::new(),
        expires: None,
        content_type: "application/json".to_owned(),
        content_encoding: "utf-8".to_owned(),
    }
}

fn lost() -> Outcome {
    Outcome::WorkerLost { status: "signal 9 (SIGKILL)".to_owned() }
}

#[tokio::test]
async fn an_early_acked_task_is_acknowledged_when_its_child_accepts_it_and_not_before() {
    let mut bench = Bench::start(early(), 1, None).await;
    bench.send("1");
    let job = bench.pool.job().await;
    assert_eq!((job.task_id.as_str(), job.acks_early), ("1", true));
    assert_eq!(bench.broker.unsettled(), 1);
    bench.pool.accept(&job).await;
    bench.settled().await;
    bench.pool.succeed(&job).await;
    assert_eq!(bench.stop().await, Exit::default());
}

/// A message of protocol 1 whose body only a child may decode.
fn packed() -> Message {
    Message { headers: Json::of(&json!({"compression": "application/x-gzip"})), ..message("old") }
}

#[tokio::test]
async fn a_message_that_a_child_translated_is_judged_anew_and_runs() {
    let mut bench = Bench::start(early(), 1, None).await;
    bench.broker.publish(QUEUE, packed());
    let job = bench.pool.job().await;
    assert_eq!((job.task.as_str(), job.acks_early), ("", false));
    let translated = message("old");
    let outcome = Outcome::Translated {
        headers: translated.headers,
        body: translated.body,
        content_type: "application/json".to_owned(),
        content_encoding: "utf-8".to_owned(),
    };
    bench.pool.end(&job, outcome).await;
    let job = bench.pool.job().await;
    assert_eq!((job.task.as_str(), job.task_id.as_str(), job.acks_early), ("tasks.add", "old", true));
    assert_eq!(bench.broker.unsettled(), 1);
    bench.pool.accept(&job).await;
    bench.pool.succeed(&job).await;
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn a_message_that_kills_two_children_before_it_is_translated_is_given_up() {
    let mut bench = Bench::start(early(), 1, None).await;
    bench.broker.publish(QUEUE, packed());
    for _ in 0..2 {
        let job = bench.pool.job().await;
        assert_eq!(bench.broker.unsettled(), 1);
        bench.pool.end(&job, lost()).await;
    }
    let incident = bench.incident().await;
    assert!(
        matches!(&incident, Incident::Undecodable { reason } if reason.contains("SIGKILL")),
        "{incident:?}"
    );
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn a_late_acked_task_is_acknowledged_after_its_result_is_stored() {
    let mut bench = Bench::start(late(), 1, None).await;
    bench.send("1");
    bench.send("2");
    let job = bench.pool.job().await;
    bench.pool.store(&job, record("1"), None).await;
    bench.pool.succeed(&job).await;
    // The slot is free before the result is written, the message is not settled before.
    let next = bench.pool.job().await;
    assert_eq!(bench.broker.unsettled(), 2);
    bench.backend.gate.add_permits(1);
    wait_until("the first is settled", async || bench.broker.unsettled() == 1).await;
    bench.pool.succeed(&next).await;
    bench.settled().await;
    assert_eq!(bench.backend.written.lock().unwrap().len(), 1);
    bench.stop().await;
}

#[tokio::test]
async fn a_child_that_waits_for_its_result_to_be_stored_is_told_when_it_is() {
    let mut bench = Bench::start(late(), 1, None).await;
    bench.send("1");
    let job = bench.pool.job().await;
    let store = StoreId { slot: 0, serial: 7 };
    bench.pool.store(&job, record("1"), Some(store)).await;
    bench.backend.gate.add_permits(1);
    assert_eq!(bench.pool.stored().await, (store, None));
    bench.pool.succeed(&job).await;
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn a_lost_child_costs_its_task_a_failure_or_a_second_run_as_the_task_says() {
    let mut bench = Bench::start(late(), 1, None).await;
    bench.send("1");
    let job = bench.pool.job().await;
    bench.pool.end(&job, lost()).await;
    assert!(matches!(bench.incident().await, Incident::WorkerLost { requeued: false, .. }));
    bench.settled().await;
    bench.stop().await;

    let policy = TaskPolicy { reject_on_worker_lost: true, ..late() };
    let mut bench = Bench::start(policy, 1, None).await;
    bench.send("1");
    let job = bench.pool.job().await;
    bench.pool.end(&job, lost()).await;
    assert!(matches!(bench.incident().await, Incident::WorkerLost { requeued: true, .. }));
    let again = bench.pool.job().await;
    assert_eq!(again.task_id, "1");
    assert!(again.info.redelivered);
    bench.pool.succeed(&again).await;
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn a_report_may_override_how_the_message_is_settled() {
    let policy = TaskPolicy { acks_on_failure: false, reject_on_worker_lost: true, ..late() };
    let mut bench = Bench::start(policy, 1, Some(Settlement::Ack)).await;
    bench.send("1");
    let job = bench.pool.job().await;
    bench.pool.end(&job, lost()).await;
    bench.incident().await;
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn a_job_whose_child_died_before_accepting_goes_to_another_child_once() {
    let mut bench = Bench::start(early(), 1, None).await;
    bench.send("1");
    let first = bench.pool.job().await;
    bench.pool.end(&first, lost()).await;
    let second = bench.pool.job().await;
    assert_eq!(second.task_id, "1");
    assert!(bench.hooks.incidents.lock().unwrap().is_empty());
    bench.pool.end(&second, lost()).await;
    assert!(matches!(bench.incident().await, Incident::WorkerLost { .. }));
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn bad_messages_are_reported_and_settled_once_and_the_queue_goes_on() {
    let mut bench = Bench::start(early(), 1, None).await;
    bench.send_with("1", &json!({"task": "tasks.unknown"}));
    bench.send_with("2", &json!({"eta": "soon"}));
    bench.send_with("3", &json!({"id": null}));
    bench.send("4");
    let job = bench.pool.job().await;
    assert_eq!(job.task_id, "4");
    bench.pool.accept(&job).await;
    bench.pool.succeed(&job).await;
    bench.settled().await;
    assert!(matches!(bench.incident().await, Incident::Unknown { .. }));
    assert!(matches!(bench.incident().await, Incident::Rejected { reason: Some(_) }));
    assert!(matches!(bench.incident().await, Incident::Rejected { reason: Some(_) }));
    bench.stop().await;
}

#[tokio::test]
async fn an_expired_task_is_revoked_and_a_task_with_an_eta_waits_for_it() {
    let iso = |seconds: f64| {
        let nanos = ((clock::now() + seconds) * 1e9) as i128;
        jiff::Timestamp::from_nanosecond(nanos).unwrap().to_string()
    };
    let mut bench = Bench::start(early(), 1, None).await;
    bench.send_with("expired", &json!({"expires": iso(-1.0)}));
    let due = clock::now() + 0.3;
    bench.send_with("later", &json!({"eta": iso(0.3)}));
    bench.send("now");
    let first = bench.pool.job().await;
    assert_eq!(first.task_id, "now");
    bench.pool.accept(&first).await;
    bench.pool.succeed(&first).await;
    let second = bench.pool.job().await;
    assert_eq!(second.task_id, "later");
    assert!(clock::now() >= due - 0.01, "it ran before its eta");
    bench.pool.accept(&second).await;
    bench.pool.succeed(&second).await;
    assert!(matches!(bench.incident().await, Incident::Revoked { expired: true, .. }));
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn what_is_revoked_from_the_start_is_discarded_and_the_clock_goes_on_from_there() {
    let mut bench = Bench::start_with(early(), 1, None, |config| {
        config.revoked = vec!["revoked".to_owned()];
        config.clock = 40;
    })
    .await;
    bench.send("revoked");
    bench.send("kept");
    let job = bench.pool.job().await;
    assert_eq!(job.task_id, "kept");
    bench.pool.accept(&job).await;
    bench.pool.succeed(&job).await;
    assert!(matches!(bench.incident().await, Incident::Revoked { reason: "revoked", .. }));
    bench.settled().await;
    let hooks = bench.hooks.clone();
    bench.stop().await;
    let notices = hooks.notices.lock().unwrap();
    assert!(matches!(notices.last(), Some(Notice::Over { clock: 40 })), "{notices:?}");
}

#[tokio::test]
async fn without_prefetch_a_message_is_fetched_only_for_an_idle_slot() {
    let mut bench = Bench::start_with(early(), 1, None, |config| config.disable_prefetch = true).await;
    for id in ["1", "2", "3"] {
        bench.send(id);
    }
    for id in ["1", "2", "3"] {
        let job = bench.pool.job().await;
        assert_eq!(job.task_id, id);
        bench.pool.accept(&job).await;
        // Acknowledged early: the broker holds nothing for us, and yet there is room for nothing.
        wait_until("it is acknowledged", async || bench.broker.unsettled() == 0).await;
        let waiting = bench.broker.waiting(QUEUE);
        tokio::task::yield_now().await;
        assert_eq!((waiting, bench.broker.unsettled()), (3 - id.parse::<usize>().unwrap(), 0));
        bench.pool.succeed(&job).await;
    }
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn limited_tasks_wait_in_their_order_and_take_no_prefetch_from_others() {
    let policy = TaskPolicy { rate_limit: Some(0.001), ..early() };
    let mut bench = Bench::start_with(policy, 2, None, |config| {
        config.prefetch_multiplier = 1;
        config.tasks.insert("tasks.free".to_owned(), early());
    })
    .await;
    for id in ["1", "2", "3", "4", "5"] {
        bench.send(id);
    }
    bench.send_with("free", &json!({"task": "tasks.free"}));
    let mut ran = Vec::new();
    for _ in 0..2 {
        let job = bench.pool.job().await;
        bench.pool.accept(&job).await;
        bench.pool.succeed(&job).await;
        ran.push(job.task_id);
    }
    assert_eq!(ran, ["1", "free"]);
    wait_until("four wait for their turn", async || bench.broker.unsettled() == 4).await;
    bench.stop.cancel();
    wait_until("what waits goes back", async || bench.broker.waiting(QUEUE) == 4).await;
    bench.stop().await;
}

#[tokio::test]
async fn time_limits_count_from_the_start_and_the_message_wins_over_the_task() {
    let policy = TaskPolicy { time_limit: Some(100.0), ..late() };
    let mut bench = Bench::start(policy, 1, None).await;
    bench.send_with("1", &json!({"timelimit": [0.1, 0.05]}));
    let job = bench.pool.job().await;
    assert_eq!(bench.pool.interrupt().await, (job.id, Interrupt::SoftLimit));
    assert_eq!(bench.pool.interrupt().await, (job.id, Interrupt::HardLimit(0.1)));
    bench.pool.end(&job, Outcome::TimedOut { limit: 0.1 }).await;
    assert!(matches!(bench.incident().await, Incident::TimedOut { requeued: false, .. }));
    bench.settled().await;
    bench.stop().await;
}

#[tokio::test]
async fn a_warm_stop_gives_back_what_has_not_started_in_order_and_lets_the_running_finish() {
    let mut bench = Bench::start(early(), 1, None).await;
    for id in ["1", "2", "3", "4"] {
        bench.send(id);
    }
    let job = bench.pool.job().await;
    bench.pool.accept(&job).await;
    wait_until("all are fetched", async || bench.broker.waiting(QUEUE) == 0).await;
    bench.stop.cancel();
    wait_until("three went back", async || bench.broker.waiting(QUEUE) == 3).await;
    assert!(!bench.worker.is_finished(), "it did not wait for the running task");
    bench.pool.succeed(&job).await;
    let exit = bench.worker.await.unwrap().unwrap();
    assert_eq!(exit, Exit::default());
    assert_eq!(bench.broker.unsettled(), 0);
    assert_eq!(bench.broker.waiting(QUEUE), 3);
}

/// What a broker does with the next publication.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    Confirm,
    /// Confirms when the test gives a permit.
    Wait,
    Refuse,
    /// The connection is lost before the broker has it.
    Lose,
}

/// A broker in memory that treats publications as it is told.
struct Moody {
    inner: MemoryBroker,
    acts: Arc<Mutex<VecDeque<Act>>>,
    gate: Arc<Semaphore>,
}

#[async_trait]
impl Broker for Moody {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn address(&self) -> String {
        self.inner.address()
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        let Session { events: mut told, commands: inner, tasks: running } =
            self.inner.connect(consume).await?;
        let (events_tx, events) = mpsc::channel(64);
        let (commands, mut asked) = mpsc::channel(64);
        let (acts, gate, address) = (self.acts.clone(), self.gate.clone(), self.address());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let _running = running;
            let mut waiting = VecDeque::new();
            loop {
                tokio::select! {
                    Some(event) = told.recv() => events_tx.send(event).await.unwrap(),
                    Some(command) = asked.recv() => match command {
                        Command::Publish(publication, answer) => {
                            let act = acts.lock().unwrap().pop_front().unwrap_or(Act::Confirm);
                            let reason = format!("{act:?}");
                            match act {
                                Act::Confirm => {}
                                Act::Wait => {
                                    waiting.push_back(Command::Publish(publication, answer));
                                    continue;
                                }
                                Act::Refuse => {
                                    let address = address.clone();
                                    answer.send(Err(BrokerError::Refused { address, reason })).unwrap();
                                    continue;
                                }
                                Act::Lose => {
                                    let address = address.clone();
                                    events_tx.send(Event::Lost(BrokerError::Connection { address, reason })).await.unwrap();
                                    return;
                                }
                            }
                            inner.send(Command::Publish(publication, answer)).await.unwrap();
                        }
                        command => inner.send(command).await.unwrap(),
                    },
                    permit = gate.acquire(), if !waiting.is_empty() => {
                        permit.unwrap().forget();
                        inner.send(waiting.pop_front().unwrap()).await.unwrap();
                    }
                    else => return,
                }
            }
        });
        Ok(Session { events, commands, tasks })
    }
}

const NEXT: &str = "next";

fn next(id: &str) -> Publication {
    Publication {
        exchange: String::new(),
        exchange_type: None,
        routing_key: NEXT.to_owned(),
        message: message(id),
        declare: Some(Arc::new(Queue::named(NEXT))),
    }
}

#[tokio::test]
async fn what_follows_a_task_is_with_the_broker_before_its_result_is_written_and_its_message_settled() {
    let mut bench = Bench::start_on(late(), 1, None, [Act::Wait]).await;
    bench.backend.gate.add_permits(1);
    bench.send("1");
    let job = bench.pool.job().await;
    bench.pool.publish(&job, next("2")).await;
    let store = StoreId { slot: 0, serial: 7 };
    bench.pool.store(&job, record("1"), Some(store)).await;
    bench.pool.succeed(&job).await;
    // Another child's work goes on meanwhile, and what it stores is written.
    bench.send("other");
    let other = bench.pool.job().await;
    bench.backend.gate.add_permits(1);
    bench.pool.store(&other, record("other"), None).await;
    bench.pool.succeed(&other).await;
    let written =
        || bench.backend.written.lock().unwrap().iter().map(|one| one.task_id.clone()).collect::<Vec<_>>();
    wait_until("the other result is written", async || !written().is_empty()).await;
    assert_eq!((written(), bench.broker.waiting(NEXT)), (vec!["other".to_owned()], 0));
    assert!(bench.broker.unsettled() > 0, "it is settled although nothing follows it yet");
    bench.moods.1.add_permits(1);
    assert_eq!(bench.pool.stored().await, (store, None));
    assert_eq!(bench.broker.waiting(NEXT), 1);
    bench.settled().await;
    assert_eq!(bench.stop().await, Exit::default());
}

#[tokio::test]
async fn a_connection_that_is_lost_with_what_follows_a_task_repeats_it_and_loses_nothing() {
    let mut bench = Bench::start_on(late(), 1, None, [Act::Lose, Act::Confirm]).await;
    bench.backend.gate.add_permits(9);
    bench.send("1");
    let job = bench.pool.job().await;
    bench.pool.publish(&job, next("2")).await;
    bench.pool.store(&job, record("1"), None).await;
    bench.pool.succeed(&job).await;
    wait_until("it is published", async || bench.broker.waiting(NEXT) == 1).await;
    bench.settled().await;
    assert_eq!(bench.backend.written.lock().unwrap().len(), 1);
    assert_eq!(bench.stop().await, Exit::default());
}

#[tokio::test]
async fn a_task_whose_continuation_the_broker_refuses_has_failed() {
    let mut bench = Bench::start_on(late(), 1, None, [Act::Refuse]).await;
    bench.backend.gate.add_permits(9);
    bench.send("1");
    let job = bench.pool.job().await;
    bench.pool.publish(&job, next("2")).await;
    let store = StoreId { slot: 0, serial: 7 };
    bench.pool.store(&job, record("1"), Some(store)).await;
    assert!(matches!(bench.pool.stored().await, (of, Some(_)) if of == store));
    bench.pool.succeed(&job).await;
    assert!(matches!(bench.incident().await, Incident::Unsent { .. }));
    bench.settled().await;
    assert_eq!(bench.broker.waiting(NEXT), 0);
    assert!(bench.backend.written.lock().unwrap().is_empty(), "its SUCCESS is not stored");
    bench.stop().await;
}
