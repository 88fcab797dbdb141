//! The conformance suite of brokers: every check of [`checks`] runs against every implementation.
//!
//! A broker joins by implementing [`Harness`] in a file here and adding one line to the list below. A check
//! that a broker cannot have by its [`Capabilities`](celeriac::broker::Capabilities) returns at once.

pub(crate) mod amqp;
mod checks;
pub(crate) mod client;
mod filesystem;
mod memory;
pub(crate) mod redis;

use std::sync::Arc;

use celeriac::broker::topology::Queue;
use celeriac::broker::{Broker, Consume, Control};
use celeriac::protocol::{Json, Message};
use serde_json::json;

/// What the suite needs of one kind of broker.
pub(crate) trait Harness: Sized {
    /// A fresh namespace on a running server. `None`: the server is not installed here.
    async fn start() -> Option<Self>;

    /// A worker's broker. Two calls give two workers: what one holds, the other does not.
    fn broker(&self) -> Arc<dyn Broker>;

    /// A name in the namespace, the same for the same `base`.
    fn name(&self, base: &str) -> String;

    /// Puts a message on a queue as a producer would, bypassing our code where that can be.
    async fn publish(&self, queue: &str, message: &Message);

    /// Puts items that no producer would send on a queue, where the broker stores such things at all.
    async fn publish_garbage(&self, queue: &str);

    /// How many messages wait in a queue.
    async fn waiting(&self, queue: &str) -> usize;

    /// How many messages workers hold; `None` where the broker cannot be asked. Only asked after a worker has
    /// closed its session or settled everything.
    async fn unsettled(&self) -> Option<usize>;

    /// Kills the server; `false` where there is none, or where other tests use it.
    fn kill_server(&mut self) -> bool {
        false
    }

    /// Whether what is given back goes before what waits; a quorum queue of RabbitMQ 3.10 puts it behind.
    fn gives_back_to_the_head(&self) -> bool {
        true
    }

    /// What a worker consuming `queues` asks for.
    fn consume(&self, queues: &[&Queue], prefetch: u32) -> Consume {
        Consume {
            node: "celery@tests".to_owned(),
            queues: queues.iter().map(|queue| (*queue).clone()).collect(),
            prefetch,
            paused: false,
            control: None,
            held: std::collections::HashSet::new(),
        }
    }

    /// A queue of the namespace, as Celery makes a missing one.
    fn queue(&self, base: &str) -> Queue {
        Queue::named(&self.name(base))
    }

    /// The exchange of remote control of the namespace.
    fn control(&self) -> Control {
        Control {
            exchange: self.name("ctl"),
            queue_ttl: Some(300.0),
            queue_expires: Some(10.0),
            queue_exclusive: false,
            serializer: "json".to_owned(),
            queue_durable: false,
        }
    }
}

/// A task message with this id, as Celery sends it.
pub(crate) fn message(id: &str) -> Message {
    let headers = json!({
        "lang": "py", "task": "tasks.add", "id": id, "shadow": null, "eta": null, "expires": null, "group": null,
        "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": id, "parent_id": null,
        "argsrepr": "(4, 6)", "kwargsrepr": "{}", "origin": "gen1@tests", "ignore_result": false,
        "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {},
    });
    let properties = json!({"correlation_id": id, "reply_to": "", "delivery_mode": 2, "priority": 0});
    Message {
        content_type: Some("application/json".to_owned()),
        content_encoding: Some("utf-8".to_owned()),
        headers: Json::of(&headers),
        properties: Json::of(&properties),
        body: bytes::Bytes::from(
            r#"[[4, 6], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]"#.to_owned(),
        ),
    }
}

/// The id of a message made by [`message`].
pub(crate) fn id(message: &Message) -> String {
    let headers = message.headers.value().expect("headers are JSON");
    headers["id"].as_str().expect("the message has an id").to_owned()
}

/// The envelope of kombu's virtual transports (Redis, filesystem, …) for a message sent straight to a queue.
pub(crate) fn envelope(queue: &str, message: &Message) -> serde_json::Value {
    use base64::Engine;
    let mut properties = message.properties.value().expect("properties are JSON");
    properties["body_encoding"] = json!("base64");
    properties["delivery_tag"] = json!(uuid::Uuid::new_v4().to_string());
    properties["delivery_info"] = json!({"exchange": "", "routing_key": queue});
    json!({
        "body": base64::engine::general_purpose::STANDARD.encode(&message.body),
        "content-encoding": message.content_encoding,
        "content-type": message.content_type,
        "headers": message.headers.value().expect("headers are JSON"),
        "properties": properties,
    })
}

/// Texts that look less and less like an envelope.
pub(crate) const GARBAGE: &[&str] = &[
    "",
    "no JSON at all",
    "null",
    "[1, 2",
    "{}",
    r#"{"body": 5, "headers": [], "properties": "none"}"#,
    r#"{"body": "%%%", "headers": {}, "properties": {"body_encoding": "base64", "delivery_tag": "x"}}"#,
    r#"{"body": "e30=", "headers": {}, "properties": {"body_encoding": "rot13", "delivery_info": 7}}"#,
    "\u{0}\u{1}\u{feff}",
];

checks::run!(on_memory: memory::MemoryHarness);
checks::run!(on_redis: redis::RedisHarness);
checks::run!(on_amqp: amqp::AmqpHarness);
checks::run!(on_amqp_quorum: amqp::QuorumHarness);
checks::run!(on_filesystem: filesystem::FilesystemHarness);
