//! Messages that the app's own objects decide about: what these are told, and what becomes of what they ask for.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use celeriac::broker::Settlement;
use celeriac::broker::memory::MemoryBroker;
use celeriac::config::{Hosting, TaskPolicy};
use celeriac::error::Error;
use celeriac::pool::{Job, Outcome, Work};
use celeriac::protocol::{DeliveryInfo, Message};
use celeriac::worker::hooks::{Hooks, LogRecord, Notice, Report, Unstarted};
use celeriac::worker::hosting::{Call, Hosted, Order, Ticket};
use celeriac::worker::told::Account;
use celeriac::worker::{self, Exit, Parts};
use futures_util::future::{BoxFuture, ready};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::broker::message;
use crate::support::pool::{Driver, scripted};
use crate::support::{DEADLINE, unique, wait_until};
use crate::worker::{QUEUE, config};

/// Plays the app: passes on what it is told, gives the orders that the test gives.
struct App {
    told: mpsc::UnboundedSender<Hosted>,
    orders: Mutex<Option<mpsc::UnboundedReceiver<Order>>>,
    refuse: Option<Settlement>,
}

#[async_trait]
impl Hooks for App {
    fn notice(&self, _notice: Notice) {}

    fn log(&self, _record: LogRecord) {}

    fn wants_received(&self) -> bool {
        false
    }

    async fn received(&self, _message: &Message, _info: &DeliveryInfo) {}

    async fn report(&self, _report: Report) -> Account {
        Account::default()
    }

    async fn store_revoked(&self, _tasks: Vec<Unstarted>) {}

    async fn control(&self, _method: &str, _arguments: Value) -> Option<Value> {
        None
    }

    fn host(&self, event: Hosted) -> BoxFuture<'static, Option<Settlement>> {
        self.told.send(event).unwrap();
        Box::pin(ready(self.refuse))
    }

    fn orders(&self) -> mpsc::UnboundedReceiver<Order> {
        self.orders.lock().unwrap().take().unwrap()
    }
}

struct Bench {
    broker: MemoryBroker,
    pool: Driver,
    told: mpsc::UnboundedReceiver<Hosted>,
    orders: mpsc::UnboundedSender<Order>,
    stop: CancellationToken,
    worker: JoinHandle<Result<Exit, Error>>,
}

impl Bench {
    async fn start(hosting: Hosting, slots: usize, refuse: Option<Settlement>) -> Self {
        let url = format!("memory://{}", unique("hosting"));
        let broker = MemoryBroker::open(&url);
        let (running, pool) = scripted(slots).await;
        let (told_tx, told) = mpsc::unbounded_channel();
        let (orders, inbox) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let parts = Parts {
            brokers: vec![Arc::new(MemoryBroker::open(&url))],
            backend: None,
            pool: running,
            hooks: Arc::new(App { told: told_tx, orders: Mutex::new(Some(inbox)), refuse }),
            stop: stop.clone(),
            signals: false,
        };
        let policy = TaskPolicy { hosting, ..TaskPolicy::default() };
        #[expect(clippy::disallowed_methods, reason = "the bench owns it and awaits its end")]
        let worker = tokio::spawn(worker::run(config(url, policy, slots), parts));
        Self { broker, pool, told, orders, stop, worker }
    }

    async fn told(&mut self) -> Hosted {
        timeout(DEADLINE, self.told.recv()).await.expect("the app is told in time").expect("the worker lives")
    }

    fn post(&self, number: u64, ticket: Option<Ticket>) {
        let body = Bytes::from(number.to_string());
        let call = Call { number, ticket, body, soft_limit: None, hard_limit: None };
        self.orders.send(Order::Call(call)).unwrap();
    }

    fn settle(&self, ticket: Ticket, settlement: Settlement) {
        self.orders.send(Order::Settle { ticket, settlement }).unwrap();
    }

    /// Sends a message whose request puts itself into the pool; its ticket and the job.
    async fn executed(&mut self, id: &str, number: u64) -> (Ticket, Job) {
        self.broker.publish(QUEUE, message(id));
        let Hosted::Received { ticket, .. } = self.told().await else { panic!("a request is made first") };
        assert!(matches!(self.told().await, Hosted::Execute { ticket: same } if same == ticket));
        self.post(number, Some(ticket));
        (ticket, self.pool.job().await)
    }

    async fn count(&self, unsettled: usize, waiting: usize) {
        wait_until(&format!("{unsettled} messages are unsettled, {waiting} wait"), async || {
            self.broker.unsettled() == unsettled && self.broker.waiting(QUEUE) == waiting
        })
        .await;
    }
}

#[tokio::test]
async fn a_request_puts_itself_into_the_pool_when_a_slot_is_idle_and_settles_its_message_itself() {
    let mut bench = Bench::start(Hosting::Request, 1, None).await;
    let (ticket, job) = bench.executed("1", 7).await;
    assert_eq!((job.work, &job.body[..]), (Work::Call, &b"7"[..]));
    bench.pool.accept(&job).await;
    assert!(matches!(bench.told().await, Hosted::Accepted { call: 7, .. }));
    bench.count(1, 0).await;
    bench.settle(ticket, Settlement::Ack);
    // The first counts.
    bench.settle(ticket, Settlement::Requeue);
    bench.count(0, 0).await;
    bench.broker.publish(QUEUE, message("2"));
    assert!(matches!(bench.told().await, Hosted::Received { .. }));
    bench.pool.answer(&job, "answer").await;
    assert!(matches!(bench.told().await, Hosted::Answered { call: 7, value } if value == "answer"));
    assert!(matches!(bench.told().await, Hosted::Execute { .. }), "the slot is idle again");
    bench.stop.cancel();
    assert_eq!(bench.worker.await.unwrap().unwrap(), Exit::default());
}

#[tokio::test]
async fn a_message_of_which_no_request_can_be_made_is_settled_as_the_app_says() {
    let mut bench = Bench::start(Hosting::Request, 1, Some(Settlement::Reject)).await;
    bench.broker.publish(QUEUE, message("1"));
    assert!(matches!(bench.told().await, Hosted::Received { .. }));
    bench.count(0, 0).await;
}

#[tokio::test]
async fn a_call_that_its_child_never_began_goes_to_another_child_once() {
    let mut bench = Bench::start(Hosting::Request, 1, None).await;
    let (_, job) = bench.executed("1", 1).await;
    let lost = || Outcome::WorkerLost { status: "signal 9 (SIGKILL)".to_owned() };
    bench.pool.end(&job, lost()).await;
    let again = bench.pool.job().await;
    assert_eq!(again.body, job.body);
    bench.pool.end(&again, lost()).await;
    match bench.told().await {
        Hosted::Lost { call: 1, status } => {
            assert_eq!(status, format!("signal 9 (SIGKILL) Job: {}", again.id - 1));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_strategy_gets_every_message_at_once_and_may_make_one_call_of_several() {
    let mut bench = Bench::start(Hosting::Strategy, 1, None).await;
    let mut tickets = Vec::new();
    for id in ["1", "2", "3"] {
        bench.broker.publish(QUEUE, message(id));
        let Hosted::Deliver { ticket, message, .. } = bench.told().await else { panic!("not delivered") };
        assert!(message.headers.value().unwrap()["id"] == id);
        tickets.push(ticket);
    }
    bench.post(1, None);
    let job = bench.pool.job().await;
    bench.pool.answer(&job, "done").await;
    assert!(matches!(bench.told().await, Hosted::Answered { call: 1, .. }));
    bench.settle(tickets[0], Settlement::Ack);
    bench.settle(tickets[1], Settlement::Requeue);
    // The requeued one comes again, under a ticket of its own.
    let Hosted::Deliver { ticket, .. } = bench.told().await else { panic!("not delivered again") };
    assert!(!tickets.contains(&ticket));
    bench.count(2, 0).await;
}

#[tokio::test]
async fn a_warm_stop_waits_for_running_calls_drops_those_that_wait_and_gives_the_rest_back() {
    let mut bench = Bench::start(Hosting::Strategy, 1, None).await;
    let mut tickets = Vec::new();
    for id in ["1", "2"] {
        bench.broker.publish(QUEUE, message(id));
        let Hosted::Deliver { ticket, .. } = bench.told().await else { panic!("not delivered") };
        tickets.push(ticket);
    }
    bench.post(1, None);
    let job = bench.pool.job().await;
    bench.post(2, None);
    bench.stop.cancel();
    // Nothing is given back while a call runs that may be for it.
    bench.settle(tickets[0], Settlement::Ack);
    bench.count(1, 0).await;
    bench.pool.answer(&job, "done").await;
    assert!(matches!(bench.told().await, Hosted::Answered { call: 1, .. }));
    assert_eq!(bench.worker.await.unwrap().unwrap(), Exit::default());
    assert_eq!((bench.broker.unsettled(), bench.broker.waiting(QUEUE)), (0, 1));
}
