//! Remote control: what `celery inspect` and `celery control` ask of a worker, and its answers.
//!
//! A request is read here and answered through one table ([`commands`]) by what the worker shows and does as a
//! [`Panel`]. Nothing here waits: a command that needs the app (its own commands, its configuration) comes back as
//! [`Handled::Ask`], and the worker asks [`crate::worker::hooks::Hooks::control`].

pub mod commands;
mod panel;
mod reference;
mod show;
mod stats;
pub mod table;

use bytes::Bytes;
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::broker::Publication;
use crate::broker::topology::Queue;
use crate::protocol::{Json, Message, json, repr};

pub use commands::run;
pub use panel::{Panel, Request as TaskRequest, Stage};
pub use reference::reference;
pub use stats::{PoolStats, Stats, broker as broker_stats};

/// Logger of what arrives.
const PIDBOX: &str = "kombu.pidbox";

/// A control request that is for this node.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Name of the command.
    pub method: String,
    /// Its arguments, by name.
    pub arguments: Map<String, Value>,
    /// Where the answer goes; none: nobody waits for one.
    pub reply_to: Option<ReplyTo>,
    /// What the answer is recognized by.
    pub ticket: Option<String>,
}

/// Where an answer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// A direct exchange.
    pub exchange: String,
    /// The asker's key.
    pub routing_key: String,
}

/// What a command comes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// This is the reply.
    Reply(Value),
    /// This is the text of the reply, as Python reads it.
    Written(String),
    /// It failed; the `repr` of the exception that Python would raise.
    Raised(String),
    /// The app is to be asked.
    Ask,
    /// This is the reply, but that the app adds to it: it is asked with this method and this.
    Told(&'static str, Map<String, Value>),
    /// This queue is to be consumed; the reply depends on what the broker says.
    Consume(Box<Queue>),
    /// No reply is sent (`shutdown`).
    Silent,
}

/// What is to be done about a message.
#[derive(Debug)]
pub enum Handled {
    /// Nothing more.
    Done,
    /// The reply is to be published.
    Reply(Box<Publication>),
    /// [`crate::worker::hooks::Hooks::control`] is to be asked with the method and the arguments, and its answer
    /// given to [`answered`].
    Ask(Request),
    /// The queue is to be consumed, the one that the app declares under its name rather than this one, and what came
    /// of it given to [`consumed`].
    Consume(Request, Box<Queue>),
}

/// Carries out a control message.
pub fn handle(message: &Message, panel: &mut dyn Panel) -> Handled {
    panel.clock().forward();
    let (clock, body) = match open(message) {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(target: PIDBOX, "Cannot decode message: {error}");
            return Handled::Done;
        }
    };
    panel.clock().adjust(clock);
    let request = match for_node(&body, panel.node()) {
        Ok(Some(request)) => request,
        Ok(None) => return Handled::Done,
        Err(error) => {
            tracing::error!(target: "celery.worker.pidbox", "Control command error: {error}");
            return Handled::Done;
        }
    };
    let reply_to = body.get("reply_to").map_or_else(|| "None".to_owned(), Value::to_string);
    let (call, ticket) = (request.call(), request.ticket.as_deref().unwrap_or("None"));
    tracing::debug!(target: PIDBOX, "pidbox received method {call} [reply_to:{reply_to} ticket:{ticket}]");
    match commands::run(&request, panel) {
        Answer::Ask => Handled::Ask(request),
        Answer::Told(method, arguments) => {
            Handled::Ask(Request { method: method.to_owned(), arguments, ..request })
        }
        Answer::Consume(queue) => Handled::Consume(request, queue),
        answer => finish(&request, answer, panel),
    }
}

/// Finishes a request that the app was asked about. `None`: the app has no such command either.
pub fn answered(request: &Request, answer: Option<Value>, panel: &mut dyn Panel) -> Option<Box<Publication>> {
    // As in 5.7: an unknown command is a KeyError that the asker is told; before, nothing was answered.
    let answer = match answer {
        None => Answer::Raised(format!("KeyError({})", repr::repr(&request.method))),
        Some(Value::String(text)) => Answer::Written(text),
        Some(value) => Answer::Reply(value),
    };
    reply(request, answer, panel)
}

/// Finishes a request to consume a queue: the error is the `repr` of the exception to report.
pub fn consumed(
    request: &Request,
    outcome: Result<(), String>,
    panel: &mut dyn Panel,
) -> Option<Box<Publication>> {
    let answer = match outcome {
        Ok(()) => commands::consumes(&request.arguments),
        Err(exception) => Answer::Raised(exception),
    };
    reply(request, answer, panel)
}

fn reply(request: &Request, answer: Answer, panel: &mut dyn Panel) -> Option<Box<Publication>> {
    match finish(request, answer, panel) {
        Handled::Reply(publication) => Some(publication),
        Handled::Done | Handled::Ask(_) | Handled::Consume(..) => None,
    }
}

fn finish(request: &Request, answer: Answer, panel: &mut dyn Panel) -> Handled {
    // A value has nothing that cannot be printed.
    let text = |value: &Value| json::to_string(value).unwrap_or_default();
    let written = match answer {
        Answer::Reply(value) => text(&value),
        Answer::Written(text) => text,
        Answer::Raised(exception) => {
            tracing::error!(target: PIDBOX, "pidbox command error: {exception}");
            text(&json!({"error": exception}))
        }
        Answer::Ask | Answer::Told(..) | Answer::Consume(_) | Answer::Silent => return Handled::Done,
    };
    let Some(reply_to) = &request.reply_to else { return Handled::Done };
    let clock = panel.clock().forward();
    let body = format!("{{{}: {written}}}", text(&Value::from(panel.node())));
    Handled::Reply(Box::new(Publication {
        exchange: reply_to.exchange.clone(),
        exchange_type: Some("direct".to_owned()),
        routing_key: reply_to.routing_key.clone(),
        message: Message {
            content_type: Some("application/json".to_owned()),
            content_encoding: Some("utf-8".to_owned()),
            headers: Json::of(&json!({"ticket": request.ticket, "clock": clock})),
            properties: Json::of(&json!({"delivery_mode": 1, "priority": 0})),
            body: Bytes::from(body),
        },
        declare: None,
    }))
}

impl Request {
    /// The request as a call, for the log.
    fn call(&self) -> String {
        let arguments: Vec<String> =
            self.arguments.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{}({})", self.method, arguments.join(", "))
    }
}

/// The sender's clock and the body.
fn open(message: &Message) -> Result<(u64, Map<String, Value>), String> {
    match message.content_type.as_deref() {
        Some("application/json") => {}
        other => return Err(format!("content of type {} is not read here", other.unwrap_or("none"))),
    }
    let clock = message.headers.value().ok().and_then(|headers| headers.get("clock")?.as_u64()).unwrap_or(0);
    match serde_json::from_slice(&message.body) {
        Ok(Value::Object(body)) => Ok((clock, body)),
        Ok(_) => Err("the body is no mapping".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The request, if it is for `node`.
fn for_node(body: &Map<String, Value>, node: &str) -> Result<Option<Request>, String> {
    let text = |name: &str| body.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let destination = body.get("destination").filter(|destination| is_true(destination));
    let ours = match (destination, text("pattern"), text("matcher")) {
        (Some(Value::Array(nodes)), ..) => nodes.iter().any(|named| named.as_str() == Some(node)),
        // Python's `in` on a text.
        (Some(Value::String(text)), ..) => text.contains(node),
        (Some(other), ..) => return Err(format!("destination {other} is no list")),
        (None, Some(pattern), Some(matcher)) => matches(node, pattern, matcher)?,
        (None, ..) => true,
    };
    if !ours {
        return Ok(None);
    }
    let method = text("method").ok_or("the request names no method")?;
    let arguments = match body.get("arguments") {
        Some(Value::Object(arguments)) => arguments.clone(),
        Some(other) if is_true(other) => return Err(format!("arguments {other} are no mapping")),
        _ => Map::new(),
    };
    let reply_to = body.get("reply_to").filter(|reply_to| is_true(reply_to));
    let reply_to = match reply_to {
        None => None,
        Some(reply_to) => {
            let part = |name: &str| reply_to.get(name).and_then(Value::as_str).map(str::to_owned);
            let (exchange, routing_key) = part("exchange")
                .zip(part("routing_key"))
                .ok_or("reply_to names no exchange and routing_key")?;
            Some(ReplyTo { exchange, routing_key })
        }
    };
    Ok(Some(Request {
        method: method.to_owned(),
        arguments,
        reply_to,
        ticket: text("ticket").map(str::to_owned),
    }))
}

/// Python's truth of a value.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(truth) => *truth,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(members) => !members.is_empty(),
    }
}

fn matches(node: &str, pattern: &str, matcher: &str) -> Result<bool, String> {
    let expression = match matcher {
        "glob" => glob(pattern),
        // Python's `re.match`: anchored at the start alone.
        "pcre" => format!("^(?:{pattern})"),
        other => return Err(format!("No matcher installed for {other}")),
    };
    let expression = Regex::new(&expression).map_err(|error| format!("pattern {pattern:?}: {error}"))?;
    Ok(expression.is_match(node))
}

/// A shell pattern as Python's `fnmatch` reads it, as a regular expression.
fn glob(pattern: &str) -> String {
    let mut out = String::from("^(?s:");
    let mut rest = pattern.chars();
    while let Some(character) = rest.next() {
        match character {
            '*' => out.push_str(".*"),
            '?' => out.push('.'),
            '[' => {
                let (negated, tail) = match rest.as_str().strip_prefix('!') {
                    Some(tail) => (true, tail),
                    None => (false, rest.as_str()),
                };
                // A closing bracket at the start stands for itself.
                let skipped = if tail.starts_with(']') { 1 } else { 0 };
                match tail[skipped..].find(']') {
                    Some(end) => {
                        out.push_str(if negated { "[^" } else { "[" });
                        for inside in tail[..end + skipped].chars() {
                            if matches!(inside, '\\' | '[' | ']' | '^' | '&' | '~') {
                                out.push('\\');
                            }
                            out.push(inside);
                        }
                        out.push(']');
                        rest = tail[end + skipped + 1..].chars();
                    }
                    None => out.push_str("\\["),
                }
            }
            _ => out.push_str(&regex::escape(&character.to_string())),
        }
    }
    out + r")\z"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Option<Request>, String> {
        for_node(body.as_object().unwrap(), "celery@host")
    }

    #[test]
    fn a_request_is_for_the_nodes_that_it_names_or_matches() {
        for (target, ours) in [
            (json!({}), true),
            (json!({"destination": null, "pattern": null, "matcher": null}), true),
            (json!({"destination": []}), true),
            (json!({"destination": ["a@b", "celery@host"]}), true),
            (json!({"destination": ["a@b"]}), false),
            (json!({"destination": ["a@b"], "pattern": "*", "matcher": "glob"}), false),
            (json!({"pattern": "*@host", "matcher": "glob"}), true),
            (json!({"pattern": "celery@hos", "matcher": "glob"}), false),
            (json!({"pattern": "celer[!a-x]@h?st", "matcher": "glob"}), true),
            (json!({"pattern": "celer[x]@host", "matcher": "glob"}), false),
            (json!({"pattern": "celery.", "matcher": "pcre"}), true),
            (json!({"pattern": "host", "matcher": "pcre"}), false),
            (json!({"pattern": "host"}), true),
        ] {
            let mut body = json!({"method": "ping"});
            body.as_object_mut().unwrap().extend(target.as_object().unwrap().clone());
            assert_eq!(read(body).unwrap().is_some(), ours, "{target}");
        }
    }

    #[test]
    fn a_glob_reads_odd_brackets_as_python_does() {
        for (pattern, text, matched) in [
            ("a[]]b", "a]b", true),
            ("a[!]]b", "axb", true),
            ("a[b", "a[b", true),
            ("a.b", "axb", false),
            ("a\\[^x]", "a\\^", true),
            ("*", "a\nb", true),
        ] {
            assert_eq!(matches(text, pattern, "glob"), Ok(matched), "{pattern}");
        }
    }

    #[test]
    fn nonsense_is_an_error_and_never_a_panic() {
        for body in [
            json!({}),
            json!({"method": 3}),
            json!({"method": "ping", "destination": 5}),
            json!({"method": "ping", "arguments": [1]}),
            json!({"method": "ping", "reply_to": {"exchange": "x"}}),
            json!({"method": "ping", "pattern": "(", "matcher": "pcre"}),
            json!({"method": "ping", "pattern": "a", "matcher": "none"}),
        ] {
            assert!(read(body.clone()).is_err(), "{body}");
        }
    }
}
