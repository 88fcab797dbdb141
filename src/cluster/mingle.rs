//! A worker that comes asks the others for what is revoked and for their clock. It works meanwhile: nothing waits for
//! the answers.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use uuid::Uuid;

/// Seconds within which the others answer, as in Celery, and some more for the way.
pub const ANSWERS_WITHIN: f64 = 1.25;

/// A question to all workers.
#[derive(Debug)]
pub struct Mingle {
    node: String,
    /// Names the queue of the answers, and their routing key.
    oid: String,
    ticket: String,
    answers: BTreeMap<String, Option<News>>,
}

/// What another worker knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Its clock.
    pub clock: Option<u64>,
    /// What is revoked, the oldest first.
    pub revoked: Vec<String>,
}

impl Mingle {
    /// A question of this node.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            oid: Uuid::new_v4().to_string(),
            ticket: Uuid::new_v4().to_string(),
            answers: BTreeMap::new(),
        }
    }

    /// The routing key of the answers.
    pub fn routing_key(&self) -> &str {
        &self.oid
    }

    /// The name of the queue of the answers, on the exchange of this name.
    pub fn queue(&self, exchange: &str) -> String {
        format!("{}.{exchange}", self.oid)
    }

    /// The body of the question; the answers go to `exchange`.
    pub fn question<'a>(&self, exchange: &str, revoked: impl Iterator<Item = &'a str>) -> Value {
        json!({
            "method": "hello",
            "arguments": {"from_node": self.node, "revoked": revoked.collect::<Vec<_>>()},
            "destination": null,
            "pattern": null,
            "matcher": null,
            "ticket": self.ticket,
            "reply_to": {"exchange": exchange, "routing_key": self.oid},
        })
    }

    /// Takes a message of the answers' queue in: by node what it says, and our own answer to ourselves.
    pub fn hear(&mut self, body: &Value) {
        for (node, said) in body.as_object().into_iter().flatten() {
            if *node == self.node {
                continue;
            }
            let news = said.as_object().filter(|said| !said.is_empty()).map(News::of);
            self.answers.insert(node.clone(), news);
        }
    }

    /// All answers, once there has been time for them; none: nobody is there.
    pub fn conclude(self) -> Option<Vec<(String, News)>> {
        if self.answers.is_empty() {
            return None;
        }
        Some(self.answers.into_iter().filter_map(|(node, news)| Some((node, news?))).collect())
    }
}

impl News {
    fn of(said: &Map<String, Value>) -> Self {
        let revoked = said.get("revoked").and_then(Value::as_array).into_iter().flatten();
        Self {
            clock: said.get("clock").and_then(Value::as_u64).filter(|clock| *clock > 0),
            revoked: revoked.filter_map(|id| id.as_str().map(str::to_owned)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_is_a_request_of_remote_control() {
        let mingle = Mingle::new("a@here");
        let question = mingle.question("reply.celery.pidbox", ["1", "2"].into_iter());
        assert_eq!(question["method"], "hello");
        assert_eq!(question["arguments"], json!({"from_node": "a@here", "revoked": ["1", "2"]}));
        assert_eq!(question["reply_to"]["routing_key"], mingle.routing_key());
        assert_eq!(
            mingle.queue("reply.celery.pidbox"),
            format!("{}.reply.celery.pidbox", mingle.routing_key())
        );
    }

    #[test]
    fn our_own_answer_does_not_count_and_whoever_says_nothing_is_there_all_the_same() {
        let mut mingle = Mingle::new("a@here");
        mingle.hear(&json!({"a@here": null}));
        mingle.hear(&json!("nonsense"));
        assert_eq!(Mingle { answers: BTreeMap::new(), ..Mingle::new("a@here") }.conclude(), None);
        mingle.hear(&json!({"b@here": null}));
        mingle.hear(&json!({"c@here": {"revoked": ["x", 3], "clock": 12}}));
        let news = News { clock: Some(12), revoked: vec!["x".into()] };
        assert_eq!(mingle.conclude(), Some(vec![("c@here".to_owned(), news)]));
    }
}
