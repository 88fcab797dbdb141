//! Native apps: a worker of Rust handlers, and what unchanged Python producers see of it.

use std::sync::{Arc, Mutex};

use celeriac::Worker;
use celeriac::broker::memory::MemoryBroker;
use celeriac::native::{Args, State, TaskContext, TaskError, WorkerBuilder};
use celeriac::protocol::{Json, Message};
use celeriac::worker::Exit;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::{unique, wait_until};

/// What ran: task ids with their sums.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<(String, i64)>>>);

async fn add(
    context: TaskContext,
    Args((x, y)): Args<(i64, i64)>,
    State(seen): State<Seen>,
) -> Result<i64, TaskError> {
    seen.0.lock().unwrap().push((context.id, x + y));
    Ok(x + y)
}

fn message(task: &str, id: &str, args: Value) -> Message {
    Message {
        content_type: Some("application/json".into()),
        content_encoding: Some("utf-8".into()),
        headers: Json::of(&json!({"task": task, "id": id})),
        properties: Json::of(&json!({"correlation_id": id})),
        body: json!([args, {}, {}]).to_string().into(),
    }
}

struct Running {
    stop: CancellationToken,
    worker: JoinHandle<Exit>,
}

fn start(builder: WorkerBuilder) -> Running {
    let stop = CancellationToken::new();
    let builder = builder.handle_signals(false).stop_with(stop.clone());
    #[expect(clippy::disallowed_methods, reason = "the test owns it and awaits its end")]
    let worker = tokio::spawn(async move { builder.run().await.unwrap() });
    Running { stop, worker }
}

impl Running {
    async fn stop(self) -> Exit {
        self.stop.cancel();
        self.worker.await.unwrap()
    }
}

#[tokio::test]
async fn a_native_app_runs_what_is_queued_settles_it_and_stops_cleanly() {
    let url = format!("memory://{}", unique("native"));
    let broker = MemoryBroker::open(&url);
    let seen = Seen::default();
    let running = start(
        Worker::builder()
            .broker(&url)
            .queue("native")
            .concurrency(3)
            .state(seen.clone())
            .task("tasks.add", add),
    );
    for number in 0..20 {
        broker.publish("native", message("tasks.add", &format!("id-{number}"), json!([number, 1])));
    }
    broker.publish("native", message("tasks.add", "wrong", json!(["a"])));
    broker.publish("native", message("tasks.unknown", "unknown", json!([])));
    wait_until("everything ran", async || seen.0.lock().unwrap().len() == 20).await;
    wait_until("everything is settled", async || broker.unsettled() == 0 && broker.waiting("native") == 0)
        .await;
    assert_eq!(running.stop().await, Exit::default());
    let mut sums: Vec<i64> = seen.0.lock().unwrap().iter().map(|(_, sum)| *sum).collect();
    sums.sort_unstable();
    assert_eq!(sums, (1..=20).collect::<Vec<_>>());
}
