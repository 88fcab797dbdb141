//! kombu's layout, read and written by kombu itself.

use celeriac::broker::{Command, Publication, Settlement};
use redis::AsyncTypedCommands;
use serde_json::{Value, json};

use super::MODULES;
use super::{Stage, consume};
use crate::broker::client::Client;
use crate::broker::{envelope, id, message};
use crate::support::python::python;

/// Publishes with Celery, or takes with kombu, and says what it saw.
const KOMBU: &str = r#"
import json, sys
from celery import Celery
from kombu import Connection, Consumer, Exchange, Queue
url, action, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
app = Celery("tests", broker=url)
app.conf.broker_transport_options = options
if action == "publish":
    app.send_task("tasks.add", (4, 6), task_id="of-celery", queue="q", priority=6)
elif action == "topic":
    exchange = Exchange("media", type="topic")
    with app.connection() as connection:
        for key in "image.new", "video.old":
            app.amqp.Producer(connection).publish(
                [[], {}, {}], exchange=exchange, routing_key=key, declare=[exchange], serializer="json",
                headers={"task": "t", "id": key, "lang": "py"})
elif action == "take":
    seen = []
    def on_message(message):
        seen.append([message.headers["id"], message.headers.get("redelivered"), message.delivery_info, message.priority
                     if hasattr(message, "priority") else message.properties.get("priority"), message.body.decode()
                     if isinstance(message.body, bytes) else message.body])
        message.ack()
    with app.connection() as connection, connection.channel() as channel:
        queue = Queue("q", Exchange("q", type="direct"), routing_key="q")
        with Consumer(channel, [queue], on_message=on_message, accept=["json"]):
            connection.drain_events(timeout=20)
    print(json.dumps(seen))
elif action == "sweep":
    with app.connection() as connection, connection.channel() as channel:
        channel.qos.restore_visible(num=None, interval=1)
elif action == "hold":
    with app.connection() as connection:
        channel = connection.channel()
        queue = Queue("q", Exchange("q", type="direct"), routing_key="q")
        consumer = Consumer(channel, [queue], on_message=lambda message: None, accept=["json"])
        consumer.consume()
        connection.drain_events(timeout=20)
        import os
        os._exit(0)
elif action == "ping":
    print(json.dumps(app.control.broadcast("ping", reply=True, timeout=20, limit=1)))
"#;

fn kombu(stage: &Stage, action: &str, options: &Value) -> Option<String> {
    Some(python(MODULES)?.run(&["-c", KOMBU, &stage.server.url(), action, &options.to_string()]))
}

/// The same while our side runs.
async fn kombu_beside(stage: &Stage, action: &'static str, options: Value) -> Option<String> {
    let (python, url) = (python(MODULES)?, stage.server.url());
    let run = move || python.run(&["-c", KOMBU, &url, action, &options.to_string()]);
    Some(tokio::task::spawn_blocking(run).await.unwrap())
}

#[tokio::test]
async fn a_message_of_celery_is_read_and_given_back_for_kombu_to_read() {
    let Some(mut stage) = Stage::start().await else { return };
    let options = json!({});
    if kombu(&stage, "publish", &options).is_none() {
        return;
    }
    let mut client = Client::connect(&*stage.broker(options.clone()), &consume(&["q"], 1)).await;
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "of-celery");
    assert_eq!(delivery.info.routing_key, "q");
    let body: Value = serde_json::from_slice(&delivery.message.body).unwrap();
    assert_eq!(body[0], json!([4, 6]));
    client.tell(Command::Pause).await;
    client.settle([delivery], Settlement::GiveBack).await;
    client.close().await;
    assert_eq!(stage.waiting("q\u{6}\u{16}6").await, 1, "it went back to the list of its priority");
    let seen: Value = serde_json::from_str(&kombu(&stage, "take", &options).unwrap()).unwrap();
    assert_eq!(seen[0][0], json!("of-celery"));
    assert_eq!(seen[0][1], json!(true));
    assert_eq!(seen[0][2]["redelivered"], json!(true));
    assert_eq!(seen[0][3], json!(6));
    assert_eq!(serde_json::from_str::<Value>(seen[0][4].as_str().unwrap()).unwrap(), body);
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn kombu_restores_what_we_hold_once_it_is_overdue_to_the_queue_it_came_from() {
    let Some(mut stage) = Stage::start().await else { return };
    // Sent through a topic exchange that nobody has declared: only the record knows the queue.
    let mut item = envelope("q", &message("ours"));
    item["properties"]["delivery_info"] = json!({"exchange": "gone", "routing_key": "some.key"});
    item["properties"]["priority"] = json!(3);
    stage.redis.lpush("q\u{6}\u{16}3", item.to_string()).await.unwrap();
    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    client.next().await.handle.abandon();
    client.vanish();
    let (field, _) = stage.unacked().await.remove(0);
    stage.redis.zadd("unacked_index", field, 5.0).await.unwrap();
    if kombu(&stage, "sweep", &json!({})).is_none() {
        return;
    }
    assert!(stage.unacked().await.is_empty());
    assert_eq!(stage.waiting("q\u{6}\u{16}3").await, 1);
}

#[tokio::test]
async fn what_a_dead_python_worker_held_is_restored_when_it_is_overdue() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["of-python"]).await;
    if kombu(&stage, "hold", &json!({})).is_none() {
        return;
    }
    assert_eq!(stage.unacked().await.len(), 1);
    let mut client =
        Client::connect(&*stage.broker(json!({"visibility_timeout": 1})), &consume(&["q"], 1)).await;
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "of-python");
    assert!(delivery.info.redelivered);
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn a_python_producer_reaches_our_queues_through_their_bindings() {
    let Some(stage) = Stage::start().await else { return };
    let mut consume = consume(&["images"], 4);
    consume.queues[0].bindings[0].exchange.name = "media".to_owned();
    consume.queues[0].bindings[0].exchange.kind = "topic".to_owned();
    consume.queues[0].bindings[0].routing_key = "image.*".to_owned();
    let mut client = Client::connect(&*stage.broker(json!({})), &consume).await;
    if kombu_beside(&stage, "topic", json!({})).await.is_some() {
        let delivery = client.next().await;
        assert_eq!(id(&delivery.message), "image.new");
        assert_eq!(
            (delivery.info.exchange.as_str(), delivery.info.routing_key.as_str()),
            ("media", "image.new")
        );
        client.settle([delivery], Settlement::Ack).await;
        client.expect_quiet("the other key is not bound").await;
    }
    client.close().await;
}

#[tokio::test]
async fn a_broadcast_of_celery_is_received_and_our_reply_reaches_it() {
    for options in [json!({}), json!({"global_keyprefix": "app_"})] {
        let Some(mut stage) = Stage::start().await else { return };
        let mut consume = consume(&["q"], 1);
        consume.control = Some(super::control());
        let mut client = Client::connect(&*stage.broker(options.clone()), &consume).await;
        let asked = tokio::task::LocalSet::new();
        let (url, python) = (stage.server.url(), python(MODULES));
        let Some(python) = python else { return };
        let text = options.to_string();
        let ping = asked.run_until(async {
            let ping = tokio::task::spawn_blocking(move || python.run(&["-c", KOMBU, &url, "ping", &text]));
            let request = client.control().await;
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            assert_eq!(body["method"], json!("ping"));
            let mut reply = message("reply");
            reply.headers = celeriac::protocol::Json::of(&json!({"ticket": body["ticket"], "clock": 1}));
            reply.body = bytes::Bytes::from_static(br#"{"celery@tests": {"ok": "pong"}}"#);
            let publication = Publication {
                exchange: body["reply_to"]["exchange"].as_str().unwrap().to_owned(),
                exchange_type: Some("direct".to_owned()),
                routing_key: body["reply_to"]["routing_key"].as_str().unwrap().to_owned(),
                message: reply,
                declare: None,
            };
            client.publish(publication).await.unwrap();
            ping.await.unwrap()
        });
        let answer: Value = serde_json::from_str(&ping.await).unwrap();
        assert_eq!(answer, json!([{"celery@tests": {"ok": "pong"}}]));
        client.close().await;
        let prefix = options["global_keyprefix"].as_str().unwrap_or_default();
        let table: std::collections::HashSet<String> =
            stage.redis.smembers(format!("{prefix}_kombu.binding.celery.pidbox")).await.unwrap();
        assert!(table.is_empty(), "a closed worker leaves no binding: {table:?}");
    }
}

#[tokio::test]
async fn a_reply_that_nobody_fetches_expires() {
    let Some(mut stage) = Stage::start().await else { return };
    let member = "oid\u{6}\u{16}\u{6}\u{16}oid.reply.celery.pidbox";
    stage.redis.sadd("_kombu.binding.reply.celery.pidbox", member).await.unwrap();
    let client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    let publication = Publication {
        exchange: "reply.celery.pidbox".to_owned(),
        exchange_type: Some("direct".to_owned()),
        routing_key: "oid".to_owned(),
        message: message("reply"),
        declare: None,
    };
    client.publish(publication).await.unwrap();
    let left: i64 =
        redis::cmd("TTL").arg("oid.reply.celery.pidbox").query_async(&mut stage.redis).await.unwrap();
    assert!((1..=60).contains(&left), "{left}");
    client.close().await;
}

#[tokio::test]
async fn lists_are_taken_by_priority_and_queues_of_one_priority_in_turns() {
    let Some(mut stage) = Stage::start().await else { return };
    for (list, id) in [
        ("a\u{6}\u{16}9", "a9"),
        ("b\u{6}\u{16}3", "b3"),
        ("a", "a0-1"),
        ("a", "a0-2"),
        ("a", "a0-3"),
        ("b", "b0-1"),
        ("b\u{6}\u{16}6", "b6"),
    ] {
        stage.redis.lpush(list, envelope("a", &message(id)).to_string()).await.unwrap();
    }
    for (strategy, expected) in [
        ("round_robin", ["a0-1", "b0-1", "a0-2", "a0-3", "b3", "b6", "a9"]),
        ("priority", ["a0-1", "a0-2", "a0-3", "b0-1", "b3", "b6", "a9"]),
        ("sorted", ["a0-1", "a0-2", "a0-3", "b0-1", "b3", "b6", "a9"]),
    ] {
        let options = json!({"queue_order_strategy": strategy});
        let mut client = Client::connect(&*stage.broker(options), &consume(&["a", "b"], 0)).await;
        let deliveries = client.take(7).await;
        let ids: Vec<String> = deliveries.iter().map(|delivery| id(&delivery.message)).collect();
        assert_eq!(ids, expected, "{strategy}");
        // Back as they were, for the next strategy: each list by hand, for the ids say where they belong.
        client.settle(deliveries, Settlement::Ack).await;
        client.close().await;
        for (list, id) in [
            ("a\u{6}\u{16}9", "a9"),
            ("b\u{6}\u{16}3", "b3"),
            ("a", "a0-1"),
            ("a", "a0-2"),
            ("a", "a0-3"),
            ("b", "b0-1"),
            ("b\u{6}\u{16}6", "b6"),
        ] {
            stage.redis.lpush(list, envelope("a", &message(id)).to_string()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn every_key_has_the_prefix() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.redis.lpush("app_q", envelope("q", &message("one")).to_string()).await.unwrap();
    let mut client =
        Client::connect(&*stage.broker(json!({"global_keyprefix": "app_"})), &consume(&["q"], 1)).await;
    let delivery = client.next().await;
    client.send("other", message("two")).await;
    let keys: Vec<String> = stage.redis.keys("*").await.unwrap();
    assert!(keys.contains(&"app_unacked".to_owned()) && keys.contains(&"app_other".to_owned()), "{keys:?}");
    assert!(keys.iter().all(|key| key.starts_with("app_")), "{keys:?}");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}
