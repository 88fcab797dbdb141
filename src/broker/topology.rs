//! Queues, exchanges and bindings, as the app declares them.

use serde::Deserialize;
use serde_json::{Map, Value};

/// An exchange.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Exchange {
    /// Name, `""` for the default exchange.
    pub name: String,
    /// `direct`, `topic`, `fanout` or `headers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Survives a restart of the broker.
    #[serde(default = "yes")]
    pub durable: bool,
    /// Deleted with its last queue.
    #[serde(default)]
    pub auto_delete: bool,
    /// Only checked, never created.
    #[serde(default)]
    pub passive: bool,
    /// Never declared.
    #[serde(default)]
    pub no_declare: bool,
    /// `x-` arguments.
    #[serde(default)]
    pub arguments: Map<String, Value>,
}

/// A binding of a queue.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Binding {
    /// The exchange it is bound to.
    pub exchange: Exchange,
    /// The key.
    #[serde(default)]
    pub routing_key: String,
    /// Arguments of the binding.
    #[serde(default)]
    pub arguments: Map<String, Value>,
}

/// A queue, with the bindings that make messages reach it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Queue {
    /// Name.
    pub name: String,
    /// Bindings, the first is the queue's own exchange; empty for a queue without exchange.
    #[serde(default)]
    pub bindings: Vec<Binding>,
    /// Survives a restart of the broker.
    #[serde(default = "yes")]
    pub durable: bool,
    /// Belongs to one connection.
    #[serde(default)]
    pub exclusive: bool,
    /// Deleted with its last consumer.
    #[serde(default)]
    pub auto_delete: bool,
    /// Never declared.
    #[serde(default)]
    pub no_declare: bool,
    /// Consumed without acknowledgements.
    #[serde(default)]
    pub no_ack: bool,
    /// `x-` arguments, `x-expires`, `x-message-ttl`, `x-max-priority` and so on included.
    #[serde(default)]
    pub arguments: Map<String, Value>,
    /// Arguments of the consumer.
    #[serde(default)]
    pub consumer_arguments: Map<String, Value>,
}

fn yes() -> bool {
    true
}

impl Queue {
    /// A durable queue of this name bound to a direct exchange of the same name, as Celery makes a missing one.
    pub fn named(name: &str) -> Self {
        let exchange = Exchange {
            name: name.to_owned(),
            kind: "direct".to_owned(),
            durable: true,
            auto_delete: false,
            passive: false,
            no_declare: false,
            arguments: Map::new(),
        };
        Self {
            name: name.to_owned(),
            bindings: vec![Binding { exchange, routing_key: name.to_owned(), arguments: Map::new() }],
            durable: true,
            exclusive: false,
            auto_delete: false,
            no_declare: false,
            no_ack: false,
            arguments: Map::new(),
            consumer_arguments: Map::new(),
        }
    }

    /// Whether this is a quorum queue.
    pub fn is_quorum(&self) -> bool {
        self.arguments.get("x-queue-type").and_then(Value::as_str) == Some("quorum")
    }
}
