//! Events on their way: in lists and in order, over an outage, and never in the way of a task.

use std::collections::HashMap;

use celeriac::broker::Consume;
use celeriac::broker::memory::MemoryBroker;
use celeriac::broker::topology::Queue;
use celeriac::config::{Config, TaskPolicy};
use serde_json::{Value, json};

use crate::broker::client::Client;
use crate::support::wait_until;
use crate::worker::{Act, Bench};

/// A monitor's queue.
const MONITOR: &str = "monitor";

fn with_events(config: &mut Config) {
    let events = json!({
        "enabled": true, "task_events": true, "exchange": "celeryev", "exchange_type": "topic",
        "serializer": "json", "software": {"sw_ident": "py-celery", "sw_ver": "5.7.0", "sw_sys": "Linux"},
    });
    config.events = Some(serde_json::from_value(events).unwrap());
}

async fn bench(slots: usize, acts: impl IntoIterator<Item = Act>) -> (Bench, Client) {
    let bench = Bench::start_as(TaskPolicy::default(), slots, None, acts, with_events).await;
    let client = monitor(&bench.broker).await;
    (bench, client)
}

/// Consumes everything that is sent to the exchange of events.
async fn monitor(broker: &MemoryBroker) -> Client {
    let mut queue = Queue::named(MONITOR);
    queue.bindings[0].exchange.name = "celeryev".to_owned();
    queue.bindings[0].exchange.kind = "topic".to_owned();
    queue.bindings[0].routing_key = "#".to_owned();
    let consume = Consume {
        node: "monitor".to_owned(),
        queues: vec![queue],
        prefetch: 0,
        paused: false,
        control: None,
        held: Default::default(),
    };
    Client::connect(broker, &consume).await
}

/// Runs one task to its end.
async fn run(bench: &mut Bench, id: &str) {
    bench.send(id);
    let job = bench.pool.job().await;
    bench.pool.accept(&job).await;
    bench.pool.succeed(&job).await;
}

/// Reads until so many task events have come: the type by task, in order, and how many messages they came in.
async fn read(client: &mut Client, count: usize) -> (HashMap<String, Vec<String>>, usize) {
    let (mut seen, mut events, mut messages) = (HashMap::<String, Vec<String>>::new(), 0, 0);
    while events < count {
        let delivery = client.next().await;
        delivery.handle.abandon();
        assert_eq!(delivery.info.routing_key, "task.multi");
        let list: Vec<Value> = serde_json::from_slice(&delivery.message.body).unwrap();
        messages += 1;
        events += list.len();
        for event in list {
            let text = |name: &str| event[name].as_str().unwrap().to_owned();
            seen.entry(text("uuid")).or_default().push(text("type"));
        }
    }
    (seen, messages)
}

const STORY: [&str; 3] = ["task-received", "task-started", "task-succeeded"];

#[tokio::test]
async fn the_events_of_a_task_come_in_order() {
    let (mut bench, mut client) = bench(1, []).await;
    run(&mut bench, "1").await;
    let (seen, _) = read(&mut client, 3).await;
    assert_eq!(seen["1"], STORY);
    bench.stop().await;
}

#[tokio::test]
async fn a_broker_that_takes_no_events_holds_up_no_task() {
    let (mut bench, mut client) = bench(1, [Act::Wait; 1000]).await;
    let ids: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    for id in &ids {
        run(&mut bench, id).await;
    }
    bench.settled().await;
    bench.moods.1.add_permits(1000);
    let (seen, messages) = read(&mut client, 300).await;
    assert!(ids.iter().all(|id| seen[id] == STORY), "{seen:?}");
    assert!(messages < 100, "what waits travels together: {messages}");
    bench.stop().await;
}

#[tokio::test]
async fn events_on_a_connection_that_is_lost_come_over_the_next() {
    let (mut bench, mut client) = bench(1, [Act::Lose]).await;
    bench.send("1");
    let job = bench.pool.job().await;
    let lost = || async { bench.moods.0.lock().unwrap().is_empty() };
    wait_until("the first event meets the end of its connection", lost).await;
    bench.pool.accept(&job).await;
    bench.pool.succeed(&job).await;
    let (seen, _) = read(&mut client, 3).await;
    assert_eq!(seen["1"], STORY);
    bench.stop().await;
}

#[tokio::test]
async fn what_is_left_at_the_stop_is_sent() {
    let (mut bench, mut client) = bench(1, [Act::Wait; 100]).await;
    run(&mut bench, "1").await;
    bench.settled().await;
    bench.moods.1.add_permits(100);
    bench.stop().await;
    let (seen, _) = read(&mut client, 3).await;
    assert_eq!(seen["1"], STORY);
}
