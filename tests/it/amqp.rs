//! What is AMQP's own: what the broker says of our declarations, refusals, lost connections, confirms, `rpc://`.

use std::collections::HashSet;
use std::sync::Arc;

use celeriac::backend::{BackendConfig, Record, ResultBackend, by_url};
use celeriac::broker::topology::Queue;
use celeriac::broker::{Broker, Command, Consume, Control, Publication, Settlement};
use celeriac::error::BrokerError;
use celeriac::protocol::{Json, Message};
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use crate::broker::amqp::{AmqpHarness, broker};
use crate::broker::client::Client;
use crate::broker::{Harness, id, message};
use crate::support::rabbitmq::RabbitServer;
use crate::support::{DEADLINE, python, wait_until};

/// A broker with these settings of Celery's.
fn broker_with(url: &str, settings: &Value) -> Arc<dyn Broker> {
    let mut config = json!({"urls": [url], "retry": true, "retry_on_startup": true});
    for (name, value) in settings.as_object().expect("an object") {
        config[name] = value.clone();
    }
    celeriac::broker::by_url(url, &serde_json::from_value(config).unwrap()).unwrap().expect("AMQP is native")
}

fn queue_with(name: &str, arguments: &Value) -> Queue {
    let mut queue = Queue::named(name);
    queue.arguments = arguments.as_object().expect("an object").clone();
    queue
}

async fn refused(broker: &dyn Broker, consume: &Consume) -> BrokerError {
    match timeout(DEADLINE, broker.connect(consume)).await.expect("connecting ends") {
        Ok(_) => panic!("the broker took it"),
        Err(error) => error,
    }
}

/// Rows by their name, for comparing.
fn by_name(rows: Vec<Map<String, Value>>) -> std::collections::BTreeMap<String, Map<String, Value>> {
    rows.into_iter()
        .map(|mut row| {
            // rabbitmqctl lists arguments in the order of declaration.
            if let Some(Value::Array(arguments)) = row.get_mut("arguments") {
                arguments.sort_by_key(ToString::to_string);
            }
            (row["name"].as_str().expect("a name").to_owned(), row)
        })
        .collect()
}

#[tokio::test]
async fn a_connection_closed_by_the_broker_ends_the_session_also_while_it_is_paused() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let queue = harness.queue("q");
    harness.publish(&queue.name, &message("one")).await;
    let broker = harness.broker();
    let consume = harness.consume(&[&queue], 1);
    let mut active = Client::connect(&*broker, &consume).await;
    let paused = Client::connect(&*broker, &consume).await;
    paused.tell(Command::Pause).await;
    let held = active.next().await;

    harness.vhost.close_connections();
    for client in [active, paused] {
        let error = client.lost().await;
        assert!(error.is_retryable(), "{error}");
    }
    let mut again = Client::connect(&*broker, &consume).await;
    let delivery = again.next().await;
    assert!(delivery.info.redelivered);
    // The outcome of the earlier delivery comes late: it must not touch the new one.
    again.settle([held], Settlement::Ack).await;
    again.settle([delivery], Settlement::Requeue).await;
    let delivery = again.next().await;
    again.settle([delivery], Settlement::Ack).await;
    again.close().await;
}

#[tokio::test]
async fn a_queue_deleted_under_its_consumer_ends_the_session() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let queue = harness.queue("q");
    let client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    let producer = lapin::Connection::connect(&harness.vhost.url(), lapin::ConnectionProperties::default())
        .await
        .unwrap();
    let channel = producer.create_channel().await.unwrap();
    channel.queue_delete(queue.name.as_str().into(), Default::default()).await.unwrap();
    let error = client.lost().await;
    assert!(error.is_retryable() && error.to_string().contains("\"q\""), "{error}");
}

#[tokio::test]
async fn a_queue_that_exists_with_other_arguments_is_refused_for_good() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let (plain, ranked) = (harness.queue("q"), queue_with("q", &json!({"x-max-priority": 10})));
    Client::connect(&*harness.broker(), &harness.consume(&[&plain], 1)).await.close().await;
    let error = refused(&*harness.broker(), &harness.consume(&[&ranked], 1)).await;
    assert!(!error.is_retryable(), "{error}");
    assert!(error.to_string().contains("PRECONDITION_FAILED"), "{error}");
}

#[tokio::test]
async fn wrong_credentials_are_refused_for_good_and_without_the_password() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let broker = broker(&harness.vhost.url().replace("guest:guest", "guest:sesame"));
    let error = refused(&*broker, &harness.consume(&[&harness.queue("q")], 1)).await;
    assert!(!error.is_retryable(), "{error}");
    assert!(!error.to_string().contains("sesame"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_worth_another_attempt() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let broker = broker(&format!("amqp://guest:guest@127.0.0.1:{}//", crate::support::process::free_port()));
    let error = refused(&*broker, &harness.consume(&[], 1)).await;
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn a_second_worker_of_the_same_name_is_refused_by_name() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let mut consume = harness.consume(&[&harness.queue("q")], 1);
    consume.control = Some(Control { queue_exclusive: true, ..harness.control() });
    let first = Client::connect(&*harness.broker(), &consume).await;
    let error = refused(&*harness.broker(), &consume).await;
    assert!(!error.is_retryable() && error.to_string().contains("celery@tests"), "{error}");
    first.close().await;
    Client::connect(&*harness.broker(), &consume).await.close().await;
}

#[tokio::test]
async fn the_ghost_of_our_own_connection_is_waited_for() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let mut consume = harness.consume(&[&harness.queue("q")], 1);
    consume.control = Some(Control { queue_exclusive: true, ..harness.control() });
    let broker = harness.broker();
    let ghost = Client::connect(&*broker, &consume).await;
    let error = refused(&*broker, &consume).await;
    assert!(error.is_retryable(), "{error}");
    ghost.close().await;
}

/// What the broker says of this channel's limits, as (per consumer, for the channel).
fn limits(harness: &AmqpHarness) -> HashSet<(u64, u64)> {
    let columns = ["vhost", "prefetch_count", "global_prefetch_count", "consumer_count"];
    let rows = harness.vhost.list("list_channels", &columns);
    let tasks = rows.iter().filter(|row| row["consumer_count"] != 0);
    tasks
        .map(|row| {
            (row["prefetch_count"].as_u64().unwrap_or(0), row["global_prefetch_count"].as_u64().unwrap_or(0))
        })
        .collect()
}

#[tokio::test]
async fn prefetch_is_counted_for_all_queues_together_and_per_consumer_once_there_is_a_quorum_queue() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let (classic, quorum) =
        (harness.queue("classic"), queue_with("quorum", &json!({"x-queue-type": "quorum"})));
    for name in ["a", "b", "c"] {
        harness.publish(&classic.name, &message(name)).await;
    }
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&classic], 2)).await;
    let mut held = client.take(2).await;
    assert_eq!(limits(&harness), [(0, 2)].into());

    client.consume(quorum.clone()).await.expect("the broker agrees");
    client.send(&quorum.name, message("d")).await;
    held.push(client.next().await);
    client.expect_quiet("the other queue's two are still held").await;
    assert_eq!(limits(&harness), [(2, 0)].into());
    client.settle(held.drain(..1), Settlement::Ack).await;
    held.push(client.next().await);
    let came: HashSet<_> = held.iter().map(|delivery| id(&delivery.message)).collect();
    assert_eq!(came, ["b", "c", "d"].map(str::to_owned).into());
    client.settle(held, Settlement::Ack).await;
    client.close().await;
    assert_eq!(harness.waiting(&quorum.name).await + harness.waiting(&classic.name).await, 0);
}

#[tokio::test]
async fn more_prefetch_than_amqp_can_say_is_none_at_all() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let client = Client::connect(&*harness.broker(), &harness.consume(&[&harness.queue("q")], 65_536)).await;
    assert_eq!(limits(&harness), [(0, 0)].into());
    client.tell(Command::Prefetch(65_535)).await;
    // An answered publication: everything before it is carried out.
    client.send("q", message("one")).await;
    assert_eq!(limits(&harness), [(0, 65_535)].into());
    client.close().await;
}

fn to(exchange: &str, key: &str) -> Publication {
    Publication {
        exchange: exchange.to_owned(),
        exchange_type: None,
        routing_key: key.to_owned(),
        message: message("one"),
        declare: None,
    }
}

#[tokio::test]
async fn a_message_that_the_broker_does_not_take_is_an_error_and_the_next_one_goes_through() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let full = queue_with("full", &json!({"x-max-length": 1, "x-overflow": "reject-publish"}));
    let client =
        Client::connect(&*harness.broker(), &harness.consume(&[&full, &harness.queue("q")], 1)).await;
    client.tell(Command::Pause).await;
    let error = client.publish(to("no such exchange", "q")).await.unwrap_err();
    assert!(!error.is_retryable() && error.to_string().contains("no such exchange"), "{error}");
    client.publish(to("", "full")).await.unwrap();
    let error = client.publish(to("", "full")).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    client.publish(to("", "q")).await.unwrap();
    // Nobody is bound there: as with Celery that is no error.
    client.publish(to("", "no such queue")).await.unwrap();
    client.close().await;
    assert_eq!((harness.waiting("full").await, harness.waiting("q").await), (1, 1));
}

#[tokio::test]
async fn a_message_published_by_kombu_is_read_as_kombu_reads_it() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let Some(python) = python("kombu") else { return };
    let script = r#"
import datetime, decimal, sys
import kombu
connection = kombu.Connection(sys.argv[1])
queue = kombu.Queue("from kombu", [kombu.binding(kombu.Exchange("ex"), "key"),
                    kombu.binding(kombu.Exchange("other", "topic"), "a.#", arguments={"one": 1})], max_priority=5, expires=600, message_ttl=300.5,
                    max_length=7, max_length_bytes=3000000000, queue_arguments={"x-queue-mode": "lazy"})
headers = {"task": "t", "id": "é", "none": None, "true": True, "int": 5, "big": 2**40, "negative": -2**40,
           "float": 1.5, "bytes": b"\xff\x00", "list": [1, [None], {"a": "b"}], "table": {"deep": {"er": []}},
           "when": datetime.datetime(2025, 11, 22, 9, 51, 26), "money": decimal.Decimal("-12.50")}
with connection.Producer() as producer:
    producer.publish([[], {}, {}], exchange="ex", routing_key="key", declare=[queue], headers=headers,
                     correlation_id="é", reply_to="me", priority=3, expiration=60, serializer="json")
"#;
    python.run(&["-c", script, &harness.vhost.url()]);

    // The same queue, as the app's configuration would describe it: the broker compares types, too.
    let mut queue = queue_with(
        "from kombu",
        &json!({"x-max-priority": 5, "x-expires": 600_000, "x-message-ttl": 300_500, "x-max-length": 7,
                "x-max-length-bytes": 3_000_000_000_u64, "x-queue-mode": "lazy"}),
    );
    queue.bindings[0].exchange.name = "ex".to_owned();
    queue.bindings[0].routing_key = "key".to_owned();
    let mut second = queue.bindings[0].clone();
    second.exchange.name = "other".to_owned();
    second.exchange.kind = "topic".to_owned();
    second.routing_key = "a.#".to_owned();
    second.arguments.insert("one".to_owned(), json!(1));
    queue.bindings.push(second);
    let before =
        harness.vhost.list("list_bindings", &["source_name", "destination_name", "routing_key", "arguments"]);
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    let delivery = client.next().await;
    let after =
        harness.vhost.list("list_bindings", &["source_name", "destination_name", "routing_key", "arguments"]);
    assert_eq!(before, after, "a binding was made a second time, with other arguments");

    let message = &delivery.message;
    assert_eq!(
        message.headers.value().unwrap(),
        json!({
            "task": "t", "id": "é", "none": null, "true": true, "int": 5, "big": 1_i64 << 40,
            "negative": -(1_i64 << 40), "float": 1.5, "list": [1, [null], {"a": "b"}],
            "bytes": {"__type__": "base64", "__value__": "/wA="}, "table": {"deep": {"er": []}},
            "when": {"__type__": "datetime", "__value__": "2025-11-22T09:51:26"},
            "money": {"__type__": "decimal", "__value__": "-12.5"},
        })
    );
    assert_eq!(
        message.properties.value().unwrap(),
        json!({
            "content_type": "application/json", "content_encoding": "utf-8", "correlation_id": "é", "reply_to": "me",
            "expiration": "60000", "delivery_mode": 2, "priority": 3,
        })
    );
    assert_eq!((delivery.info.exchange.as_str(), delivery.info.routing_key.as_str()), ("ex", "key"));
    assert_eq!(message.body, r#"[[], {}, {}]"#);
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}

/// What `celery worker` declares, and what we declare for the same queues, as the broker lists it.
#[tokio::test]
async fn the_broker_sees_the_same_exchanges_queues_and_bindings_as_from_a_celery_worker() {
    let Some(theirs) = AmqpHarness::start().await else { return };
    let Some(python) = python("celery") else { return };
    let app = r#"
import sys
from celery import Celery
from kombu import Exchange, Queue, binding
app = Celery("topology", broker=sys.argv.pop(), backend="disabled://")
app.conf.task_queues = [
    Queue("plain"),
    Queue("ranked", Exchange("ranked", "direct"), "rk", max_priority=9, message_ttl=60.0),
    Queue("news", [binding(Exchange("news", "topic"), "news.#"), binding(Exchange("more", "fanout", durable=False), "")],
          durable=False),
    Queue("auto", Exchange("auto", "direct", auto_delete=True, durable=False), "auto", auto_delete=True),
]
app.worker_main(["worker", "-n", "celery@tests", "-P", "solo", "--without-mingle", "--without-gossip", "--without-heartbeat"])
"#;
    let _worker = python.start(&["-c", app, &theirs.vhost.url()]);
    wait_until("Celery's worker listens", async || {
        let rows = theirs.vhost.list("list_queues", &["name", "consumers"]);
        rows.len() == 5 && rows.iter().all(|row| row["consumers"] == 1)
    })
    .await;

    let Some(ours) = AmqpHarness::start().await else { return };
    let queue = |name: &str, exchange: &str, kind: &str, key: &str| {
        let mut queue = Queue::named(name);
        queue.bindings[0].exchange.name = exchange.to_owned();
        queue.bindings[0].exchange.kind = kind.to_owned();
        queue.bindings[0].routing_key = key.to_owned();
        queue
    };
    // As Celery completes it: no exchange of its own means the default one, with the default key.
    let plain = queue("plain", "celery", "direct", "celery");
    let mut ranked = queue("ranked", "ranked", "direct", "rk");
    ranked.arguments =
        json!({"x-max-priority": 9, "x-message-ttl": 60_000}).as_object().expect("an object").clone();
    let mut news = queue("news", "news", "topic", "news.#");
    news.durable = false;
    let mut more = news.bindings[0].clone();
    more.exchange.name = "more".to_owned();
    more.exchange.kind = "fanout".to_owned();
    more.exchange.durable = false;
    more.routing_key = String::new();
    news.bindings.push(more);
    let mut auto = queue("auto", "auto", "direct", "auto");
    auto.auto_delete = true;
    auto.bindings[0].exchange.auto_delete = true;
    auto.bindings[0].exchange.durable = false;
    let mut consume = ours.consume(&[&plain, &ranked, &news, &auto], 4);
    consume.control = Some(Control {
        exchange: "celery".to_owned(),
        queue_ttl: Some(300.0),
        queue_expires: Some(10.0),
        queue_exclusive: true,
        queue_durable: false,
        serializer: "json".to_owned(),
    });
    let client = Client::connect(&*ours.broker(), &consume).await;

    let columns = ["name", "durable", "auto_delete", "exclusive", "arguments", "consumers"];
    assert_eq!(
        by_name(ours.vhost.list("list_queues", &columns)),
        by_name(theirs.vhost.list("list_queues", &columns))
    );
    let columns = ["name", "type", "durable", "auto_delete", "internal", "arguments"];
    let mut expected = by_name(theirs.vhost.list("list_exchanges", &columns));
    // For its events and replies Celery declares when it first sends; so do we.
    for sent_to in ["celeryev", "reply.celery.pidbox"] {
        expected.remove(sent_to);
    }
    assert_eq!(by_name(ours.vhost.list("list_exchanges", &columns)), expected);
    let columns = ["source_name", "destination_name", "routing_key", "arguments"];
    let bindings = |harness: &AmqpHarness| -> HashSet<String> {
        let rows = harness.vhost.list("list_bindings", &columns);
        rows.into_iter().map(|row| Value::Object(row).to_string()).collect()
    };
    assert_eq!(bindings(&ours), bindings(&theirs));
    assert_eq!(limits(&ours).len(), 2, "remote control and tasks");
    client.close().await;
}

fn rpc(harness: &AmqpHarness, persistent: bool) -> Arc<dyn ResultBackend> {
    let config =
        BackendConfig { url: "rpc://".to_owned(), native: true, persistent, ..BackendConfig::default() };
    let broker = json!({"urls": [harness.vhost.url()], "retry": true, "retry_on_startup": true});
    by_url(&config, &serde_json::from_value(broker).unwrap()).unwrap().expect("rpc over AMQP is native")
}

fn record(id: &str, key: &str) -> Record {
    Record {
        task_id: id.to_owned(),
        state: "SUCCESS".to_owned(),
        document: bytes::Bytes::from(json!({"task_id": id, "status": "SUCCESS", "result": 3}).to_string()),
        key: key.to_owned(),
        expires: None,
        content_type: "application/json".to_owned(),
        content_encoding: "utf-8".to_owned(),
    }
}

#[tokio::test]
async fn a_result_sent_by_rpc_is_read_by_a_plain_consumer_of_the_reply_queue() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let channel = harness.channel().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-expires".into(), AMQPValue::LongInt(86_400_000));
    let options = QueueDeclareOptions { durable: true, auto_delete: true, ..QueueDeclareOptions::default() };
    channel.queue_declare("oid".into(), options, arguments).await.unwrap();
    let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies =
        channel.basic_consume("oid".into(), "".into(), no_ack, FieldTable::default()).await.unwrap();

    for (persistent, mode) in [(false, 1), (true, 2)] {
        let backend = rpc(&harness, persistent);
        // The second has no caller, the third one's caller is gone: neither is an error.
        let answers = backend.store(&[record("a", "oid"), record("b", ""), record("c", "gone")]).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        let reply = timeout(DEADLINE, replies.next()).await.expect("a reply comes").unwrap().unwrap();
        assert_eq!(reply.data, record("a", "").document);
        assert_eq!(reply.properties.correlation_id().as_ref().unwrap().as_str(), "a");
        assert_eq!(reply.properties.content_type().as_ref().unwrap().as_str(), "application/json");
        assert_eq!(*reply.properties.delivery_mode(), Some(mode));
        assert!(backend.get("a").await.unwrap_err().to_string().contains("rpc"));
    }
}

#[tokio::test]
async fn rpc_connects_again_by_itself() {
    let Some(harness) = AmqpHarness::start().await else { return };
    harness.publish("oid", &message("declares the queue")).await;
    let backend = rpc(&harness, false);
    assert!(backend.store(&[record("a", "oid")]).await[0].is_ok());
    harness.vhost.close_connections();
    wait_until("results are stored again", async || {
        match backend.store(&[record("b", "oid")]).await.remove(0) {
            Ok(()) => true,
            Err(error) => {
                assert!(error.is_retryable(), "{error}");
                false
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_caller_in_python_gets_the_result_that_rpc_sends() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let Some(python) = python("celery") else { return };
    let caller = r#"
import sys
from celery import Celery
app = Celery("caller", broker=sys.argv[1], backend="rpc://")
result = app.send_task("tasks.add", (1, 2), queue="q")
print(result.get(timeout=40), flush=True)
"#;
    let caller = python.start(&["-c", caller, &harness.vhost.url()]);
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&harness.queue("q")], 1)).await;
    let delivery = client.next().await;
    let key =
        delivery.message.properties.value().unwrap()["reply_to"].as_str().expect("a reply queue").to_owned();
    let answers = rpc(&harness, false).store(&[record(&id(&delivery.message), &key)]).await;
    assert!(answers[0].is_ok(), "{answers:?}");
    client.settle([delivery], Settlement::Ack).await;
    assert_eq!(caller.said().trim(), "3");
    client.close().await;
}

#[tokio::test]
async fn celery_inspect_reaches_the_control_queue_and_hears_a_reply() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let Some(python) = python("celery") else { return };
    let mut consume = harness.consume(&[&harness.queue("q")], 1);
    consume.control =
        Some(Control { exchange: "celery".to_owned(), queue_exclusive: true, ..harness.control() });
    let mut client = Client::connect(&*harness.broker(), &consume).await;
    let script = r#"
import sys
from celery import Celery
app = Celery("inspect", broker=sys.argv[1])
print(app.control.inspect(timeout=40, limit=1).ping(), flush=True)
"#;
    let inspect = python.start(&["-c", script, &harness.vhost.url()]);
    let request = client.control().await;
    let body: Value = serde_json::from_slice(&request.body).unwrap();
    assert_eq!(body["method"], "ping");
    let reply = Publication {
        exchange: body["reply_to"]["exchange"].as_str().expect("an exchange").to_owned(),
        exchange_type: Some("direct".to_owned()),
        routing_key: body["reply_to"]["routing_key"].as_str().expect("a key").to_owned(),
        message: Message {
            content_type: Some("application/json".to_owned()),
            content_encoding: Some("utf-8".to_owned()),
            headers: Json::of(&json!({"ticket": body["ticket"], "clock": 7})),
            properties: Json::of(&json!({"delivery_mode": 1})),
            body: bytes::Bytes::from_static(br#"{"celery@tests": {"ok": "pong"}}"#),
        },
        declare: None,
    };
    client.publish(reply).await.unwrap();
    assert_eq!(inspect.said().trim(), "{'celery@tests': {'ok': 'pong'}}");
    client.close().await;
}

#[tokio::test]
async fn a_message_with_headers_nested_without_end_or_text_that_is_no_text_is_delivered_like_any_other() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let mut queue = harness.queue("q");
    queue.bindings[0].exchange.name = "amq.fanout".to_owned();
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    // Published inside the broker: a producer's library would fall over it, too.
    let published = harness.vhost.eval(
        r#"Deep = lists:foldl(fun(_, Value) -> {array, [Value]} end, {void, undefined}, lists:seq(1, 15000)),
           {Kind, Value} = Deep,
           Headers = [{<<"deep">>, Kind, Value}, {<<"task">>, longstr, <<"tasks.add">>}, {<<"k", 255>>, bool, true}],
           None = undefined,
           Properties = {'P_basic', None, None, Headers, 2, None, <<"id", 254>>, None, None, None, None, None, None,
                         None, None},
           rabbit_basic:publish({resource, VHOST, exchange, <<"amq.fanout">>}, <<"key", 253>>, Properties, <<"{}">>)."#,
    );
    assert_eq!(published.trim(), "ok");
    let delivery = client.next().await;
    let headers = delivery.message.headers.value().expect("the headers can be read");
    assert_eq!(headers["task"], "tasks.add");
    assert!(headers["deep"][0][0][0].is_array());
    assert_eq!(headers["k?"], true);
    assert_eq!(delivery.message.properties.value().unwrap()["correlation_id"], "id?");
    assert_eq!(delivery.info.routing_key, "key?");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}

/// Passes bytes between a client and the broker until it is told to stop; then the connections stay open
/// and silent, as behind a router that has lost its power.
struct Hole {
    port: u16,
    silent: tokio_util::sync::CancellationToken,
    tasks: tokio::task::JoinSet<()>,
    /// One message for each client that has gone.
    gone: tokio::sync::mpsc::UnboundedReceiver<()>,
}

impl Hole {
    async fn to(port: u16) -> Self {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let silent = tokio_util::sync::CancellationToken::new();
        let (sender, gone) = tokio::sync::mpsc::unbounded_channel();
        let mut tasks = tokio::task::JoinSet::new();
        let token = silent.clone();
        tasks.spawn(async move {
            let mut clients = tokio::task::JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let (token, sender) = (token.clone(), sender.clone());
                clients.spawn(async move {
                    let mut server = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let (mut up, mut down) = ([0; 4096], [0; 4096]);
                    loop {
                        tokio::select! {
                            read = client.read(&mut up) => match read {
                                Ok(count) if count > 0 => {
                                    if !token.is_cancelled() {
                                        server.write_all(&up[..count]).await.unwrap();
                                    }
                                }
                                _ => break,
                            },
                            read = server.read(&mut down), if !token.is_cancelled() => match read {
                                Ok(count) if count > 0 => client.write_all(&down[..count]).await.unwrap(),
                                _ => break,
                            },
                            () = token.cancelled(), if !token.is_cancelled() => {}
                        }
                    }
                    // The test may be over.
                    let _ = sender.send(());
                });
            }
        });
        Self { port: own, silent, tasks, gone }
    }
}

#[tokio::test]
async fn a_session_whose_peer_is_silent_is_lost_by_its_heartbeat_and_leaves_no_connection_behind() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let mut hole = Hole::to(harness.vhost.port()).await;
    let url = harness.vhost.url().replace(&harness.vhost.port().to_string(), &hole.port.to_string());
    let broker = broker(&format!("{url}?heartbeat=1"));
    let consume = harness.consume(&[&harness.queue("q")], 1);
    let client = Client::connect(&*broker, &consume).await;
    let dropped = Client::connect(&*broker, &consume).await;
    hole.silent.cancel();
    dropped.vanish();
    timeout(DEADLINE, hole.gone.recv()).await.expect("a session that is dropped closes its connection");
    let error = client.lost().await;
    assert!(error.is_retryable(), "{error}");
    timeout(DEADLINE, hole.gone.recv()).await.expect("a session that is lost closes its connection");
    hole.tasks.shutdown().await;
}

#[tokio::test]
async fn closing_ends_in_time_although_the_peer_is_silent() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let hole = Hole::to(harness.vhost.port()).await;
    let url = harness.vhost.url().replace(&harness.vhost.port().to_string(), &hole.port.to_string());
    let client = Client::connect(&*broker(&url), &harness.consume(&[&harness.queue("q")], 1)).await;
    hole.silent.cancel();
    client.close().await;
}

#[tokio::test]
async fn connecting_to_a_silent_peer_ends_in_time() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let hole = Hole::to(harness.vhost.port()).await;
    hole.silent.cancel();
    let broker = broker(&format!("amqp://127.0.0.1:{}//?connect_timeout=0.2", hole.port));
    let error = refused(&*broker, &harness.consume(&[], 1)).await;
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn tls_checks_the_certificate_as_broker_use_ssl_says() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let Some((url, folder)) = harness.vhost.tls() else { return };
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let consume = harness.consume(&[&harness.queue("q")], 1);
    let authority = file("ca.pem");
    for good in [
        // As py-amqp: no name is checked unless one is given.
        json!({"ca_certs": authority}),
        json!({"ca_certs": authority, "server_hostname": "rabbit.test", "cert_reqs": 2}),
        json!({"ca_certs": authority, "certfile": file("client.pem"), "keyfile": file("client.key")}),
        json!({"ca_certs": authority, "certfile": file("client.pem")}),
        json!({"cert_reqs": "CERT_NONE"}),
    ] {
        let mut client = Client::connect(&*broker_with(&url, &json!({"use_ssl": good})), &consume).await;
        client.send("q", message("over TLS")).await;
        let delivery = client.next().await;
        client.settle([delivery], Settlement::Ack).await;
        client.close().await;
    }
    for (bad, word) in [
        (json!(true), "certificate"),
        (json!({"ca_certs": authority, "server_hostname": "another.test"}), "certificate"),
        (json!({"ca_certs": authority, "server_hostname": null}), "certificate"),
        (json!({"ca_certs": file("no such file")}), "no such file"),
        (json!({"ca_certs": authority, "certfile": authority}), "ca.pem"),
    ] {
        let error = refused(&*broker_with(&url, &json!({"use_ssl": bad})), &consume).await;
        assert!(error.to_string().contains(word), "{bad}: {error}");
    }
}

#[tokio::test]
async fn operators_see_who_is_connected() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let settings =
        json!({"transport_options": {"client_properties": {"team": "mail"}}, "login_method": "AMQPLAIN"});
    let client =
        Client::connect(&*broker_with(&harness.vhost.url(), &settings), &harness.consume(&[], 1)).await;
    client.send("q", message("opens the publisher's connection")).await;
    let rows = harness.vhost.list("list_connections", &["vhost", "client_properties", "auth_mechanism"]);
    let said: Vec<_> = rows.iter().map(|row| Value::Object(row.clone()).to_string()).collect();
    let ours: Vec<_> = said.iter().filter(|row| row.contains("celeriac")).collect();
    assert_eq!(ours.len(), 2, "{said:?}");
    assert!(
        ours.iter()
            .all(|row| row.contains("celery@tests") && row.contains("mail") && row.contains("AMQPLAIN"))
    );
    assert!(ours.iter().any(|row| row.contains("celery@tests (publisher)")), "{said:?}");
    client.close().await;
}

#[tokio::test]
async fn tasks_that_are_held_for_later_do_not_stop_a_consumer_that_counts_for_itself() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let quorum = queue_with("quorum", &json!({"x-queue-type": "quorum"}));
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&quorum], 2)).await;
    for number in 0..12 {
        client.send("quorum", message(&number.to_string())).await;
    }
    // As the worker does it: each task with an eta raises the count.
    let mut held = Vec::new();
    while held.len() < 9 {
        held.push(client.next().await);
        client.tell(Command::Prefetch(2 + u32::try_from(held.len()).unwrap())).await;
    }
    let running = client.take(2).await;
    client.expect_quiet("nine are held for later and two are being run").await;
    // One of them is due: the count goes down as it is settled.
    client.settle(held.drain(..1), Settlement::Ack).await;
    client.tell(Command::Prefetch(10)).await;
    client.expect_quiet("ten may be held").await;
    client.settle(running, Settlement::Ack).await;
    held.extend(client.take(1).await);
    client.settle(held, Settlement::Ack).await;
    client.close().await;
    assert_eq!(harness.waiting("quorum").await, 0);
}

#[tokio::test]
async fn a_queue_that_cannot_be_added_is_left_out_and_the_session_goes_on() {
    let Some(harness) = AmqpHarness::start().await else { return };
    harness.publish("other", &message("declares the queue")).await;
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&harness.queue("q")], 2)).await;
    let refused = client.consume(queue_with("other", &json!({"x-max-priority": 3}))).await.unwrap_err();
    assert!(!refused.is_retryable() && refused.to_string().contains("PRECONDITION_FAILED"), "{refused}");
    let absent = Queue { no_declare: true, ..Queue::named("absent") };
    let refused = client.consume(absent).await.unwrap_err();
    assert!(refused.to_string().contains("NOT_FOUND"), "{refused}");
    client.send("q", message("still consumed")).await;
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "still consumed");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}

#[tokio::test]
async fn while_the_broker_takes_no_messages_deliveries_are_still_settled() {
    let Some((server, _alone)) = RabbitServer::troubled().await else { return };
    let harness = AmqpHarness::on(server).await;
    harness.publish("q", &message("one")).await;
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&harness.queue("q")], 1)).await;
    let delivery = client.next().await;
    // The publisher's connection is one that the broker knows to publish.
    client.send("other", message("before")).await;
    server.control(&["set_vm_memory_high_watermark", "0"]);
    let late = client.begin(to("", "q")).await;
    client.settle([delivery], Settlement::Ack).await;
    wait_until("the delivery is settled", async || harness.unsettled().await == Some(0)).await;
    client.expect_quiet("nothing is published").await;
    server.control(&["set_vm_memory_high_watermark", "0.8"]);
    timeout(DEADLINE, late).await.expect("the broker takes it in the end").unwrap().unwrap();
    let delivery = client.next().await;
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}

#[tokio::test]
async fn a_delivery_that_is_held_longer_than_the_broker_allows_costs_the_connection_and_not_the_worker() {
    let Some((server, _alone)) = RabbitServer::troubled().await else { return };
    let harness = AmqpHarness::on(server).await;
    harness.publish("q", &message("one")).await;
    server.eval("application:set_env(rabbit, consumer_timeout, 300), application:set_env(rabbit, channel_tick_interval, 100).");
    let consume = harness.consume(&[&harness.queue("q")], 1);
    let broker = harness.broker();
    let mut client = Client::connect(&*broker, &consume).await;
    server.eval("application:set_env(rabbit, consumer_timeout, 1800000), application:set_env(rabbit, channel_tick_interval, 60000).");
    let held = client.next().await;
    let error = client.lost().await;
    assert!(error.is_retryable() && error.to_string().contains("PRECONDITION_FAILED"), "{error}");
    let mut client = Client::connect(&*broker, &consume).await;
    let delivery = client.next().await;
    client.settle([held, delivery], Settlement::Ack).await;
    client.close().await;
    assert_eq!(harness.waiting("q").await, 0);
}

#[tokio::test]
async fn one_bad_message_does_not_take_those_with_it_that_were_on_their_way() {
    let Some(harness) = AmqpHarness::start().await else { return };
    let client = Client::connect(&*harness.broker(), &harness.consume(&[&harness.queue("q")], 1)).await;
    client.tell(Command::Pause).await;
    let mut answers = Vec::new();
    for number in 0..40 {
        answers.push(
            client.begin(if number % 10 == 5 { to("no such exchange", "q") } else { to("", "q") }).await,
        );
    }
    for (number, answer) in answers.into_iter().enumerate() {
        let outcome = timeout(DEADLINE, answer).await.expect("an answer comes").expect("an answer comes");
        match outcome {
            Ok(()) => assert_ne!(number % 10, 5),
            Err(error) => assert!(number % 10 == 5 && !error.is_retryable(), "{number}: {error}"),
        }
    }
    client.close().await;
    // Each at least once.
    assert!(harness.waiting("q").await >= 36);
}
