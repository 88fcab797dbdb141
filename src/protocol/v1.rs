//! Protocol 1 to protocol 2, once, at the edge: behind it every task is a protocol 2 message.
//!
//! A protocol 1 message carries everything in its body, a mapping; a hybrid one has a `task` header beside such a
//! body, and its headers win. Only JSON is read here; what needs a decoder that can run code is left to a child.

use bytes::Bytes;
use indexmap::IndexMap;

use super::json::{self, JsonError};
use super::{Json, Message, repr};

/// Why a message is no protocol 1 task that can be translated here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum V1Error {
    /// Not a task: rejected with `Received and deleted unknown message.  Wrong destination?!?`.
    #[error("not a task: {0}")]
    NotATask(&'static str),
    /// The body cannot be read: acknowledged with `Can't decode message body`.
    #[error("{0}")]
    Undecodable(String),
    /// A task whose parts are of the wrong kind: rejected with `Received invalid task message`.
    #[error("{0}")]
    Malformed(String),
    /// Another serializer or a compressed body: to be decoded by a child, never by the supervisor.
    #[error("only a child decodes the body")]
    Foreign,
}

impl From<JsonError> for V1Error {
    fn from(error: JsonError) -> Self {
        Self::Undecodable(error.to_string())
    }
}

/// Keys of the body that travel in the body of protocol 2, not in its headers.
const IN_BODY: [&str; 5] = ["args", "kwargs", "callbacks", "errbacks", "chord"];

/// Keys of a hybrid body that become headers, in the order in which Celery lists them, with their defaults.
const HYBRID: [(&str, &str); 15] = [
    ("lang", "null"),
    ("task", "null"),
    ("id", "null"),
    ("root_id", "null"),
    ("parent_id", "null"),
    ("group", "null"),
    ("meth", "null"),
    ("shadow", "null"),
    ("eta", "null"),
    ("expires", "null"),
    ("retries", "0"),
    ("timelimit", "[null, null]"),
    ("argsrepr", "null"),
    ("kwargsrepr", "null"),
    ("origin", "null"),
];

/// Whether a message with a `task` header may be a hybrid, whose body [`translate`] must read: its body is a JSON
/// object, while that of protocol 2 is an array.
pub fn may_be_hybrid(message: &Message) -> bool {
    is_json(message) && message.body.trim_ascii_start().first() == Some(&b'{')
}

/// The protocol 2 message for a protocol 1 or hybrid one. The body is JSON `[args, kwargs, embed]` with each part as
/// it came. The headers hold `utc`: where it is false, `eta` and `expires` without an offset are in the app's timezone.
///
/// # Errors
/// [`V1Error`] says how the message is to be settled.
pub fn translate(message: &Message) -> Result<Message, V1Error> {
    let text = |bytes| std::str::from_utf8(bytes).map_err(|error| V1Error::Undecodable(error.to_string()));
    let headers = text(message.headers.as_bytes())?;
    if headers.trim_ascii() == "null" {
        return Err(V1Error::NotATask("it has no headers"));
    }
    let headers = json::members(headers)?;
    match message.content_type.as_deref() {
        None => return Err(V1Error::NotATask("it has no content type")),
        Some(_) if !is_json(message) => return Err(V1Error::Foreign),
        Some(_) => {}
    }
    if headers.get("compression").is_some_and(|value| *value != "null") {
        return Err(V1Error::Foreign);
    }
    let body = text(&message.body)?;
    json::check(body)?;
    if body.trim_ascii_start().as_bytes().first() != Some(&b'{') {
        return Err(V1Error::NotATask("its body is no mapping"));
    }
    let body = json::members(body)?;
    let headers_2 = match (headers.contains_key("task"), body.contains_key("task"), body.contains_key("args"))
    {
        // As in 5.7: whatever has arguments is taken for a hybrid, and loses what that list does not name.
        (true, _, true) | (_, true, true) => from_hybrid(&headers, &body)?,
        (_, true, false) => from_body(message, &body)?,
        (_, false, _) => return Err(V1Error::NotATask("its body names no task")),
    };
    let kwargs = body.get("kwargs").copied().unwrap_or("{}");
    if !kwargs.starts_with('{') {
        return Err(V1Error::Malformed("Task keyword arguments must be a mapping".to_owned()));
    }
    if headers_2.get("id").is_none_or(|id| !id.starts_with('"')) {
        return Err(V1Error::Malformed("Task message has no id".to_owned()));
    }
    let part = |name: &str| body.get(name).copied().unwrap_or("null");
    let body_2 = format!(
        r#"[{}, {kwargs}, {{"callbacks": {}, "errbacks": {}, "chord": {}, "chain": null}}]"#,
        body.get("args").copied().unwrap_or("[]"),
        part("callbacks"),
        part("errbacks"),
        part("chord"),
    );
    Ok(Message {
        content_type: Some("application/json".to_owned()),
        content_encoding: Some("utf-8".to_owned()),
        headers: object(&headers_2),
        properties: message.properties.clone(),
        body: Bytes::from(body_2),
    })
}

fn is_json(message: &Message) -> bool {
    message.content_type.as_deref() == Some("application/json")
}

/// Headers of a plain protocol 1 message: its whole body but for what travels in the body of protocol 2.
fn from_body(message: &Message, body: &IndexMap<String, &str>) -> Result<IndexMap<String, String>, V1Error> {
    let mut headers = IndexMap::new();
    for (key, value) in body.iter().filter(|(key, _)| !IN_BODY.contains(&key.as_str())) {
        headers.insert(key.clone(), (*value).to_owned());
    }
    show_arguments(&mut headers, body)?;
    headers.insert("headers".to_owned(), String::from_utf8_lossy(message.headers.as_bytes()).into_owned());
    if let Some(taskset) = body.get("taskset") {
        headers.insert("group".to_owned(), (*taskset).to_owned());
    }
    headers.entry("utc".to_owned()).or_insert_with(|| "true".to_owned());
    Ok(headers)
}

/// `argsrepr` and `kwargsrepr`, where the sender has not written them.
fn show_arguments(
    headers: &mut IndexMap<String, String>,
    body: &IndexMap<String, &str>,
) -> Result<(), V1Error> {
    // Absent arguments are an empty tuple in Python, and shown as one.
    let args = match body.get("args") {
        Some(args) => repr::saferepr(args, None, repr::LEVELS)?,
        None => "()".to_owned(),
    };
    let kwargs = repr::saferepr(body.get("kwargs").copied().unwrap_or("{}"), None, repr::LEVELS)?;
    for (key, shown) in [("argsrepr", args), ("kwargsrepr", kwargs)] {
        if headers.get(key).is_none_or(|known| known == "null") {
            headers.insert(key.to_owned(), literal(&shown));
        }
    }
    Ok(())
}

fn from_hybrid(
    headers: &IndexMap<String, &str>,
    body: &IndexMap<String, &str>,
) -> Result<IndexMap<String, String>, V1Error> {
    let mut merged: IndexMap<String, String> = HYBRID
        .iter()
        .map(|(key, default)| ((*key).to_owned(), (*body.get(*key).unwrap_or(default)).to_owned()))
        .collect();
    merged.extend(headers.iter().map(|(key, value)| (key.clone(), (*value).to_owned())));
    // Celery forgets it, and the results of a chord come in any order.
    if let Some(index) = body.get("group_index") {
        merged.entry("group_index".to_owned()).or_insert_with(|| (*index).to_owned());
    }
    show_arguments(&mut merged, body)?;
    let utc = body.get("utc").copied().unwrap_or("true");
    merged.entry("utc".to_owned()).or_insert_with(|| utc.to_owned());
    Ok(merged)
}

fn literal(text: &str) -> String {
    let mut out = String::new();
    json::write_string(&mut out, text);
    out
}

fn object(members: &IndexMap<String, String>) -> Json {
    let mut out = String::from("{");
    for (index, (key, value)) in members.iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        json::write_string(&mut out, key);
        out.push_str(": ");
        out.push_str(value);
    }
    out.push('}');
    Json(Bytes::from(out))
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use serde_json::Value;

    use super::*;
    use crate::protocol::Kind;

    fn message(envelope: &Value) -> Message {
        let text = |key: &str| envelope[key].as_str().map(str::to_owned);
        let body = envelope["body"].as_str().unwrap();
        Message {
            content_type: text("content-type"),
            content_encoding: text("content-encoding"),
            headers: Json::of(&envelope["headers"]),
            properties: Json::of(&envelope["properties"]),
            body: base64::engine::general_purpose::STANDARD.decode(body).unwrap().into(),
        }
    }

    fn plain(body: &str) -> Message {
        Message {
            content_type: Some("application/json".into()),
            content_encoding: Some("utf-8".into()),
            headers: Json::empty(),
            properties: Json::empty(),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    #[test]
    fn recorded_messages_become_what_the_original_makes_of_them() {
        let cases: Vec<Value> =
            serde_json::from_str(include_str!("../../tests/messages/v1/recorded.json")).unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let (name, becomes) = (&case["name"], &case["becomes"]);
            match (translate(&message(&case["envelope"])), becomes.as_object().unwrap()) {
                (Ok(translated), _) => {
                    assert_eq!(translated.headers.value().unwrap(), becomes["headers"], "{name}");
                    assert_eq!(
                        std::str::from_utf8(&translated.body).unwrap(),
                        becomes["body"].as_str().unwrap(),
                        "{name}"
                    );
                    assert!(matches!(translated.kind(), Kind::Task(_)), "{name}");
                }
                (Err(V1Error::Malformed(text)), expected) => {
                    assert_eq!(Some(&Value::from(text)), expected.get("malformed"), "{name}");
                }
                (Err(V1Error::Undecodable(_)), expected) => {
                    assert!(expected.contains_key("undecodable"), "{name}");
                }
                (Err(error), _) => panic!("{name}: {error}"),
            }
        }
    }

    #[test]
    fn what_is_no_task_is_told_apart_from_what_cannot_be_read() {
        for body in ["{}", "[]", "3", "\"task\"", r#"{"args": [], "kwargs": {}}"#] {
            assert!(matches!(translate(&plain(body)), Err(V1Error::NotATask(_))), "{body}");
        }
        for body in ["", "{", "{\"task\": \"a\"} x", "\u{1}"] {
            assert!(matches!(translate(&plain(body)), Err(V1Error::Undecodable(_))), "{body}");
        }
        for headers in ["null", "{}"] {
            let unsaid = Message { content_type: None, headers: Json(headers.into()), ..plain("{}") };
            assert!(matches!(translate(&unsaid), Err(V1Error::NotATask(_))));
        }
    }

    #[test]
    fn a_task_without_id_is_malformed() {
        for body in [r#"{"task": "a"}"#, r#"{"task": "a", "id": null}"#, r#"{"task": "a", "id": 3}"#] {
            assert!(matches!(translate(&plain(body)), Err(V1Error::Malformed(_))), "{body}");
        }
    }

    #[test]
    fn other_serializers_and_compressed_bodies_are_left_to_a_child() {
        for content_type in ["application/x-python-serialize", "application/x-yaml", "application/data"] {
            let foreign = Message { content_type: Some(content_type.into()), ..plain("\u{80}") };
            assert_eq!(translate(&foreign).unwrap_err(), V1Error::Foreign);
        }
        let compressed =
            Message { headers: Json(r#"{"compression": "application/x-gzip"}"#.into()), ..plain("x") };
        assert_eq!(translate(&compressed).unwrap_err(), V1Error::Foreign);
    }

    #[test]
    fn only_an_object_beside_a_task_header_may_be_a_hybrid() {
        assert!(may_be_hybrid(&plain(r#" {"args": []}"#)));
        assert!(!may_be_hybrid(&plain("[[], {}, {}]")));
        let pickle = Message { content_type: Some("application/x-python-serialize".into()), ..plain("{") };
        assert!(!may_be_hybrid(&pickle));
    }
}
