//! Queues, exchanges and bindings, as the app declares them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// An exchange.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
    /// Another name that users know it by: that of a broadcast, whose queues have names of their own.
    #[serde(default)]
    pub alias: Option<String>,
    /// What `inspect active_queues` shows of it, where the app knows more than what is declared.
    #[serde(default)]
    pub shown: Option<Value>,
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
            alias: None,
            shown: None,
        }
    }

    /// Whether this is the queue that users mean by `name`.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.alias.as_deref() == Some(name)
    }

    /// Whether this is a quorum queue.
    pub fn is_quorum(&self) -> bool {
        self.arguments.get("x-queue-type").and_then(Value::as_str) == Some("quorum")
    }
}

/// Whether a key matches the pattern of a topic binding: `*` is one word, `#` any number of them, words are parted by
/// dots.
pub fn topic_matches(pattern: &str, key: &str) -> bool {
    fn words(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => (0..=key.len()).any(|skipped| words(rest, &key[skipped..])),
            (Some((word, pattern)), Some((other, key))) => {
                (*word == "*" || word == other) && words(pattern, key)
            }
            _ => false,
        }
    }
    words(&pattern.split('.').collect::<Vec<_>>(), &key.split('.').collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_one_word_and_a_hash_any_number() {
        for (pattern, key, matches) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("a.#", "a", true),
            ("a.#", "a.b.c", true),
            ("#.c", "a.b.c", true),
            ("#", "", true),
            ("*.b.#", "a.b", true),
            ("*.b.#", "b", false),
        ] {
            assert_eq!(topic_matches(pattern, key), matches, "{pattern} {key}");
        }
    }
}
