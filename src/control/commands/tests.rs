//! Every reply beside the one that a stock worker gave to the same request.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;
use crate::cluster::clock::LamportClock;
use crate::control::panel::Request as TaskRequest;
use crate::control::table::{COMMANDS, Kind};
use crate::control::{Handled, PoolStats, Stats, answered, consumed, handle};
use crate::protocol::{DeliveryInfo, Json, Message, TaskHeaders};
use crate::worker::revoked::RevokedTasks;

struct Held {
    headers: TaskHeaders,
    message: Message,
    info: DeliveryInfo,
    stage: Stage,
    started: Option<(f64, u32)>,
}

/// A worker in the state of the recorded one.
#[derive(Default)]
struct Desk {
    clock: LamportClock,
    revoked: RevokedTasks,
    held: Vec<Held>,
    queues: Vec<Queue>,
    tasks: BTreeMap<String, Option<String>>,
    did: Vec<String>,
    events: bool,
}

impl Panel for Desk {
    fn node(&self) -> &str {
        "celery@recorded"
    }
    fn clock(&mut self) -> &mut LamportClock {
        &mut self.clock
    }
    fn revoked(&mut self) -> &mut RevokedTasks {
        &mut self.revoked
    }
    fn requests(&self) -> Vec<TaskRequest<'_>> {
        self.held
            .iter()
            .map(|held| TaskRequest {
                headers: &held.headers,
                message: Some(&held.message),
                info: &held.info,
                stage: held.stage,
                time_start: held.started.map(|(at, _)| at),
                acknowledged: held.started.is_some(),
                worker_pid: held.started.map(|(_, pid)| pid),
            })
            .collect()
    }
    fn queues(&self) -> Vec<Queue> {
        self.queues.clone()
    }
    fn stats(&self) -> Stats {
        Stats {
            total: BTreeMap::from([("tasks.sleep".to_owned(), 1)]),
            uptime: Duration::from_millis(6500),
            pool: PoolStats {
                name: "prefork".into(),
                capacity: 1,
                pids: vec![1],
                writes: 1,
                ..Default::default()
            },
            broker: crate::control::stats::broker("redis://127.0.0.1:1/0", &broker_config()),
            prefetch_count: 3,
            autoscaler: None,
        }
    }
    fn tasks(&self) -> Vec<(String, Option<String>)> {
        self.tasks.clone().into_iter().collect()
    }
    fn default_signal(&self) -> i32 {
        15
    }
    fn revoke(&mut self, ids: &[String]) {
        for id in ids {
            self.revoked.insert(id, tokio::time::Instant::now());
        }
    }
    fn store_revoked(&mut self, tasks: Vec<Unstarted>) {
        for Unstarted { id, task } in tasks {
            self.did.push(format!("store {id} of {task:?}"));
        }
    }
    fn terminate(&mut self, id: &str, signal: i32) -> Result<(), String> {
        self.did.push(format!("terminate {id} {signal}"));
        Ok(())
    }
    fn rate_limit(&mut self, task: &str, rate: Option<f64>, text: Option<&str>) -> bool {
        self.did.push(format!("rate {task} {rate:?} {text:?}"));
        self.tasks.contains_key(task)
    }
    fn time_limit(&mut self, task: &str, soft: Option<f64>, hard: Option<f64>) -> bool {
        self.did.push(format!("time {task} {soft:?} {hard:?}"));
        self.tasks.contains_key(task)
    }
    fn cancel_consumer(&mut self, queue: &str) {
        self.queues.retain(|known| known.name != queue);
    }
    fn autoscales(&self) -> bool {
        false
    }
    fn autoscale(&mut self, _: Option<u32>, _: Option<u32>) -> Option<(usize, usize)> {
        None
    }
    fn grow(&mut self, by: usize) -> Result<(), String> {
        self.did.push(format!("grow {by}"));
        Ok(())
    }
    fn shrink(&mut self, _: usize) -> Result<(), String> {
        Err(r#"ValueError("Can't shrink pool. All processes busy!")"#.to_owned())
    }
    fn enable_events(&mut self) -> Option<bool> {
        Some(!std::mem::replace(&mut self.events, true))
    }
    fn disable_events(&mut self) -> Option<bool> {
        Some(std::mem::replace(&mut self.events, false))
    }
    fn send_heartbeat(&mut self) {
        self.did.push("heartbeat".to_owned());
    }
    fn elect(&mut self, id: &str, topic: &str, action: Value) {
        self.did.push(format!("elect {id} {topic} {action}"));
    }
    fn shutdown(&mut self) {
        self.did.push("shutdown".to_owned());
    }
}

fn broker_config() -> crate::broker::BrokerConfig {
    serde_json::from_value(json!({
        "urls": ["redis://127.0.0.1:1/0"], "retry": true, "retry_on_startup": true,
        "connection_timeout": 4, "heartbeat": 120.0,
    }))
    .unwrap()
}

fn message(body: &Value, headers: &Value) -> Message {
    Message {
        content_type: Some("application/json".into()),
        content_encoding: Some("utf-8".into()),
        headers: Json::of(headers),
        properties: Json::of(&json!({"priority": 0})),
        body: Bytes::from(body.to_string()),
    }
}

fn held(id: &str, task: &str, stage: Stage, body: Value, reprs: (&str, &str)) -> Held {
    let headers = json!({
        "task": task, "id": id, "argsrepr": reprs.0, "kwargsrepr": reprs.1,
        "eta": if stage == Stage::Scheduled { json!("2030-01-01T00:00:00+00:00") } else { Value::Null },
        "stamped_headers": ["team"], "stamps": {"team": ["red", "blue"]},
    });
    Held {
        headers: serde_json::from_value(headers.clone()).unwrap(),
        message: message(&body, &headers),
        info: DeliveryInfo { routing_key: "celery".into(), ..Default::default() },
        stage,
        started: (stage == Stage::Active).then_some((1.5, 1)),
    }
}

fn desk() -> Desk {
    let builtin = [
        "accumulate",
        "backend_cleanup",
        "chain",
        "chord",
        "chord_unlock",
        "chunks",
        "group",
        "map",
        "starmap",
    ];
    let mut tasks: BTreeMap<_, _> = builtin.map(|name| (format!("celery.{name}"), None)).into();
    tasks.insert("tasks.add".to_owned(), None);
    tasks.insert("tasks.sleep".to_owned(), Some("100/m".to_owned()));
    let note = json!([[60], {"note": "it's"}, {}]);
    Desk {
        held: vec![
            held("active", "tasks.sleep", Stage::Active, note, ("(60,)", r"{'note': 'it\'s'}")),
            held("reserved", "tasks.sleep", Stage::Reserved, json!([[1], {}, {}]), ("(1,)", "{}")),
            held("scheduled", "tasks.add", Stage::Scheduled, json!([[1, 1], {}, {}]), ("(1, 1)", "{}")),
        ],
        queues: vec![Queue::named("celery")],
        tasks,
        ..Desk::default()
    }
}

/// The reply to a request, as the asker reads it; the app knows no commands.
fn reply(desk: &mut Desk, request: &Value, headers: &Value) -> Option<Value> {
    let publication = match handle(&message(request, headers), desk) {
        Handled::Done => None,
        Handled::Reply(publication) => Some(publication),
        Handled::Ask(request) => answered(&request, None, desk),
        Handled::Consume(request, queue) => {
            desk.queues.push(*queue);
            consumed(&request, Ok(()), desk)
        }
    }?;
    assert_eq!(publication.exchange, "reply.celery.pidbox");
    assert_eq!(publication.routing_key, request["reply_to"]["routing_key"]);
    let headers = publication.message.headers.value().unwrap();
    assert_eq!(headers["ticket"], request["ticket"]);
    assert!(headers["clock"].is_u64());
    Some(serde_json::from_slice(&publication.message.body).unwrap())
}

/// Replaces what differs from run to run: times, pids, clocks.
fn steady(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for (key, value) in members.iter_mut() {
                let kind = match value {
                    Value::Number(_) => "number",
                    Value::String(_) => "text",
                    _ => "",
                };
                match key.as_str() {
                    "connect_timeout" | "time_start" | "worker_pid" | "clock" | "uptime" | "eta" | "port"
                    | "pid"
                        if !kind.is_empty() =>
                    {
                        *value = kind.into();
                    }
                    "rusage" | "writes" => {
                        for value in value.as_object_mut().unwrap().values_mut() {
                            *value = (if value.is_string() { "text" } else { "other" }).into();
                        }
                    }
                    "processes" => *value = json!([value.as_array().unwrap().len()]),
                    _ => steady(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(steady),
        _ => {}
    }
}

#[tokio::test]
async fn every_reply_is_what_a_stock_worker_replied() {
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("../../../tests/messages/control/recorded.json")).unwrap();
    let mut desk = desk();
    let mut compared = 0;
    for case in cases {
        let request = &case["request"];
        let mut ours = reply(&mut desk, request, &case["headers"]).unwrap_or(Value::Null);
        let mut theirs = case["reply"].clone();
        // The first was recorded without gossip, where the original stumbles; the second is answered by Python.
        if ["election", "pool_restart"].contains(&request["method"].as_str().unwrap()) {
            continue;
        }
        steady(&mut ours);
        steady(&mut theirs);
        assert_eq!(ours, theirs, "{request}");
        compared += 1;
    }
    assert!(compared > 45, "{compared}");
}

fn ask(desk: &mut Desk, method: &str, arguments: Value) -> Value {
    let request = json!({
        "method": method, "arguments": arguments, "ticket": "t",
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "k"},
    });
    reply(desk, &request, &json!({})).map_or(Value::Null, |reply| reply["celery@recorded"].clone())
}

#[tokio::test]
async fn effects_reach_the_worker_once() {
    let mut desk = desk();
    ask(
        &mut desk,
        "revoke",
        json!({"task_id": ["active", "reserved", "active"], "terminate": true, "signal": 9}),
    );
    ask(&mut desk, "rate_limit", json!({"task_name": "tasks.add", "rate_limit": "30/m"}));
    ask(&mut desk, "time_limit", json!({"task_name": "tasks.add", "hard": 2.5}));
    ask(&mut desk, "pool_grow", json!({"n": 2}));
    ask(&mut desk, "heartbeat", json!({}));
    ask(&mut desk, "election", json!({"id": "e", "topic": "task", "action": {"task": "t"}}));
    let request = json!({"method": "shutdown"});
    assert_eq!(reply(&mut desk, &request, &json!({})), None);
    assert_eq!(
        desk.did,
        [
            "store reserved of Some(\"tasks.sleep\")",
            "terminate active 9",
            "terminate reserved 9",
            "rate tasks.add Some(0.5) Some(\"30/m\")",
            "time tasks.add None Some(2.5)",
            "grow 2",
            "heartbeat",
            r#"elect e task {"task":"t"}"#,
            "shutdown",
        ]
    );
    assert_eq!(desk.revoked.ids().collect::<Vec<_>>(), ["active", "reserved"]);
}

#[tokio::test]
async fn stamps_end_what_runs_under_them() {
    let mut desk = desk();
    let answer = ask(
        &mut desk,
        "revoke_by_stamped_headers",
        json!({"headers": {"team": ["blue", "green"]}, "terminate": true, "signal": "SIGKILL"}),
    );
    assert_eq!(answer, json!({"ok": "headers defaultdict(<class 'set'>, {'team': {'blue'}}) revoked"}));
    assert_eq!(desk.did, ["terminate active 9"]);
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_shown_by_its_text() {
    let mut desk = desk();
    desk.held[0].message.content_type = Some("application/x-python-serialize".into());
    desk.held[1].message.body = Bytes::from_static(b"[[NaN], {}, {}]");
    let active = ask(&mut desk, "active", json!({}));
    assert_eq!((&active[0]["args"], &active[0]["kwargs"]), (&json!("(60,)"), &json!(r"{'note': 'it\'s'}")));
    assert_eq!(ask(&mut desk, "reserved", json!({}))[0]["args"], json!("(1,)"));
}

#[tokio::test]
async fn a_request_for_others_or_without_a_listener_gets_no_reply() {
    let mut desk = desk();
    let elsewhere = json!({"method": "ping", "destination": ["celery@other"], "reply_to": {}});
    assert_eq!(reply(&mut desk, &elsewhere, &json!({"clock": 40})), None);
    assert_eq!(desk.clock.value(), 41);
    assert_eq!(reply(&mut desk, &json!({"method": "ping"}), &json!({})), None);
    assert!(matches!(handle(&message(&json!([1]), &json!({})), &mut desk), Handled::Done));
}

#[test]
fn every_name_and_alias_is_there_once() {
    let mut names: Vec<_> = COMMANDS.iter().flat_map(|row| [Some(row.name), row.alias]).flatten().collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(COMMANDS.iter().any(|row| row.kind == Kind::Inspect));
}
