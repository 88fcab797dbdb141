//! Bindings in kombu's tables: declared for our queues, looked up for messages with a named exchange.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use regex::Regex;
use serde_json::Value;

use super::link::{BIND, Call, Link};
use super::shared::Shared;
use crate::broker::topology::Queue;
use crate::error::BrokerError;

/// As kombu: a binding table outlives its expiring queue by this, refreshed every third of it.
const SHORTEST_BINDING: Duration = Duration::from_secs(3600);

/// A binding that was declared.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    pub(crate) queue: String,
    exchange: String,
    member: String,
    /// It goes when nobody refreshes it for so long; none: it stays.
    lifetime: Option<Duration>,
}

impl Bound {
    /// How often it is to be refreshed.
    pub(crate) fn interval(&self) -> Option<Duration> {
        self.lifetime.map(|lifetime| lifetime / 3)
    }

    /// Writes the binding. The table is made again where it was wiped.
    pub(crate) async fn declare(&self, link: &Link, shared: &Shared) -> Result<(), BrokerError> {
        let table = shared.keys.binding(&self.exchange);
        let Some(lifetime) = self.lifetime else {
            let mut pipeline = redis::pipe();
            pipeline.sadd(table, &self.member).ignore();
            // The sweep of expired tables spares those with a member here.
            pipeline.sadd(shared.keys.binding_permanent(&self.exchange), &self.member).ignore();
            return link.pipe(&pipeline).await;
        };
        let deadlines = shared.keys.binding_deadlines();
        let mut call = Call::new([table.as_str(), deadlines.as_str()]);
        call.arg(&self.member)
            .arg(&self.exchange)
            .arg(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX));
        link.eval(&BIND, &call).await
    }

    /// Takes the binding back and deletes the lists, as kombu does when it deletes a queue.
    pub(crate) async fn delete(&self, link: &Link, shared: &Shared) -> Result<(), BrokerError> {
        let mut pipeline = redis::pipe();
        pipeline.srem(shared.keys.binding(&self.exchange), &self.member).ignore();
        pipeline.srem(shared.keys.binding_permanent(&self.exchange), &self.member).ignore();
        pipeline.del(shared.keys.lists_of(&self.queue)).ignore();
        link.pipe(&pipeline).await
    }
}

/// Declares a queue: its bindings, for a queue on Redis is nothing else until a message lies in it.
pub(crate) async fn declare(link: &Link, shared: &Shared, queue: &Queue) -> Result<Vec<Bound>, BrokerError> {
    let expires = queue.arguments.get("x-expires").and_then(Value::as_f64).filter(|expires| *expires >= 0.0);
    let lifetime = expires.map(|milliseconds| {
        Duration::from_secs_f64((milliseconds / 1000.0).min(1e9)).saturating_mul(2).max(SHORTEST_BINDING)
    });
    // A queue is bound to the default exchange by its name alone.
    let bindings =
        queue.bindings.iter().filter(|binding| !binding.exchange.name.is_empty() && !queue.no_declare);
    let mut declared = Vec::new();
    for binding in bindings {
        let key = &binding.routing_key;
        let pattern = if binding.exchange.kind == "topic" { pattern_of(key) } else { String::new() };
        let bound = Bound {
            queue: queue.name.clone(),
            exchange: binding.exchange.name.clone(),
            member: shared.keys.binding_member(key, &pattern, &queue.name),
            lifetime,
        };
        bound.declare(link, shared).await?;
        declared.push(bound);
    }
    Ok(declared)
}

/// kombu's regular expression for a topic's key.
fn pattern_of(key: &str) -> String {
    let words: Vec<String> = key
        .split('.')
        .map(|word| match word {
            "*" => r"[^\.]+".to_owned(),
            "#" => ".*?".to_owned(),
            // `*` and `#` within a word stay as they are, which makes an expression that few intend; it is what
            // kombu writes, and both sides must write the same member.
            word => word.chars().map(escaped).collect(),
        })
        .collect();
    format!("^{}$", words.join(r"\."))
}

fn escaped(char: char) -> String {
    match char {
        '\0' => r"\000".to_owned(),
        '.' | '#' | '*' => char.to_string(),
        _ if char.is_alphanumeric() => char.to_string(),
        _ => format!("\\{char}"),
    }
}

/// Looks queues up, reading each table once.
pub(crate) struct Routes<'a> {
    link: &'a Link,
    shared: &'a Shared,
    tables: HashMap<String, Vec<String>>,
}

impl<'a> Routes<'a> {
    pub(crate) fn new(link: &'a Link, shared: &'a Shared) -> Self {
        Self { link, shared, tables: HashMap::new() }
    }

    /// The queues that a message with this key reaches; the dead letter queue when there are none and one is named.
    pub(crate) async fn queues(&mut self, exchange: &str, key: &str) -> Result<Vec<String>, BrokerError> {
        if !self.tables.contains_key(exchange) {
            let mut read = redis::cmd("SMEMBERS");
            read.arg(self.shared.keys.binding(exchange));
            let members: Vec<Vec<u8>> = self.link.query(&read).await?;
            let members = members.into_iter().filter_map(|member| String::from_utf8(member).ok()).collect();
            self.tables.insert(exchange.to_owned(), members);
        }
        let members = self.tables.get(exchange).map(Vec::as_slice).unwrap_or_default();
        let bindings = members.iter().filter_map(|member| self.shared.keys.binding_parts(member));
        let mut queues = matching(bindings, key);
        if queues.is_empty() {
            queues.extend(self.shared.options.deadletter_queue.clone());
        }
        Ok(queues.into_iter().collect())
    }
}

/// A binding with a pattern belongs to a topic exchange, one without to a direct one.
fn matching<'a>(bindings: impl Iterator<Item = (&'a str, &'a str, &'a str)>, key: &str) -> BTreeSet<String> {
    bindings
        .filter(|(routing_key, pattern, _)| {
            if pattern.is_empty() {
                *routing_key == key
            } else {
                Regex::new(pattern).is_ok_and(|p| p.is_match(key))
            }
        })
        .map(|(_, _, queue)| queue.to_owned())
        .filter(|queue| !queue.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_keys_become_the_expressions_that_kombu_writes() {
        for (key, pattern) in [
            ("a.*", r"^a\.[^\.]+$"),
            ("#", r"^.*?$"),
            ("stock.#", r"^stock\..*?$"),
            ("a-b.c_d", r"^a\-b\.c\_d$"),
        ] {
            assert_eq!(pattern_of(key), pattern);
        }
    }

    #[test]
    fn bindings_with_a_pattern_match_by_it_and_others_exactly() {
        let bindings = [("a.*", r"^a\.[^\.]+$", "topic"), ("a.b", "", "direct"), ("", "", "fanout")];
        let found = |key: &str| matching(bindings.into_iter(), key).into_iter().collect::<Vec<_>>();
        assert_eq!(found("a.b"), ["direct", "topic"]);
        assert_eq!(found("a.c"), ["topic"]);
        assert!(found("b").is_empty());
    }
}
