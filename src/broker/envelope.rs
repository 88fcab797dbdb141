//! A message as kombu's virtual transports write it, in a list of Redis or a file: read, written and marked, with
//! every part that is not ours to change kept byte for byte.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::broker::Publication;
use crate::protocol::{DeliveryInfo, Json, Message};

/// A thing that is no envelope. kombu's worker dies of one; ours says so and goes on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("it is not a JSON object as kombu writes it: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it is not a JSON object with an object of properties")]
    NoObject,
    #[error("its body is not {encoding}")]
    Body { encoding: String },
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    body: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "content-type")]
    content_type: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "content-encoding")]
    content_encoding: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    headers: Option<&'a RawValue>,
    #[serde(borrow)]
    properties: &'a RawValue,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Properties {
    body_encoding: Option<String>,
    delivery_info: Option<Info>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Info {
    exchange: Option<String>,
    routing_key: Option<String>,
    redelivered: Option<Value>,
}

type Object<'a> = IndexMap<Cow<'a, str>, Cow<'a, RawValue>>;

/// Reads an item that was taken from `queue`.
pub(crate) fn read(item: &[u8], queue: &str) -> Result<(Message, DeliveryInfo), Malformed> {
    let item = plain(item);
    if !is_object(&item) {
        return Err(Malformed::NoObject);
    }
    let envelope: Envelope<'_> = serde_json::from_slice(&item)?;
    if !is_object(envelope.properties.get().as_bytes()) {
        return Err(Malformed::NoObject);
    }
    let properties: Properties = serde_json::from_str(envelope.properties.get())?;
    let body = match envelope.body {
        None => Bytes::new(),
        Some(text) => decode(&text, properties.body_encoding.as_deref())?,
    };
    let headers = match envelope.headers {
        None => Json::empty(),
        Some(raw) => Json(Bytes::copy_from_slice(raw.get().as_bytes())),
    };
    let message = Message {
        content_type: envelope.content_type.map(Cow::into_owned),
        content_encoding: envelope.content_encoding.map(Cow::into_owned),
        headers,
        properties: Json(Bytes::copy_from_slice(envelope.properties.get().as_bytes())),
        body,
    };
    let info = properties.delivery_info.unwrap_or_default();
    let info = DeliveryInfo {
        exchange: info.exchange.unwrap_or_default(),
        routing_key: info.routing_key.unwrap_or_else(|| queue.to_owned()),
        redelivered: info.redelivered == Some(Value::Bool(true)),
        queue: queue.to_owned(),
    };
    Ok((message, info))
}

// A struct is read from an array as well.
fn is_object(text: &[u8]) -> bool {
    text.trim_ascii_start().starts_with(b"{")
}

fn decode(text: &str, encoding: Option<&str>) -> Result<Bytes, Malformed> {
    match encoding {
        None | Some("") => Ok(Bytes::copy_from_slice(text.as_bytes())),
        Some(name) if name.eq_ignore_ascii_case("utf-8") => Ok(Bytes::copy_from_slice(text.as_bytes())),
        Some("base64") => STANDARD
            .decode(text)
            .or_else(|_| {
                // As Python: line ends and the like between the letters do not matter.
                let letters: Vec<u8> = text
                    .bytes()
                    .filter(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='))
                    .collect();
                STANDARD.decode(letters)
            })
            .map(Bytes::from)
            .map_err(|_| Malformed::Body { encoding: "base64".to_owned() }),
        Some(other) => Err(Malformed::Body { encoding: format!("in an encoding we know, but {other}") }),
    }
}

/// Python writes and reads `NaN` and infinities as bare words, which JSON lacks. They become null; the body
/// is not touched by this, being text within quotes.
fn plain(item: &[u8]) -> Cow<'_, [u8]> {
    let mut quoted = false;
    let mut escaped = false;
    let suspicious = item.iter().any(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'N' | b'I' if !quoted => return true,
            _ => {}
        }
        false
    });
    if !suspicious {
        return Cow::Borrowed(item);
    }
    let mut out = Vec::with_capacity(item.len());
    let (mut rest, mut quoted) = (item, false);
    while let [first, tail @ ..] = rest {
        match first {
            b'\\' if quoted && !tail.is_empty() => {
                out.extend_from_slice(&rest[..2]);
                rest = &rest[2..];
                continue;
            }
            b'"' => quoted = !quoted,
            b'N' | b'I' | b'-' if !quoted => {
                let word =
                    [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find(|word| rest.starts_with(word));
                if let Some(word) = word {
                    out.extend_from_slice(b"null");
                    rest = &rest[word.len()..];
                    continue;
                }
            }
            _ => {}
        }
        out.push(*first);
        rest = tail;
    }
    Cow::Owned(out)
}

/// What `unacked` holds for a field.
pub(crate) struct Record {
    /// The envelope, marked as redelivered.
    pub(crate) envelope: String,
    /// Exchange and routing key that lead back to the queue.
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
    /// Decides the list.
    pub(crate) priority: i64,
}

/// Reads a record and marks its envelope as redelivered where kombu does, changing nothing else.
pub(crate) fn restored(record: &[u8]) -> Result<Record, Malformed> {
    let record = plain(record);
    let (envelope, exchange, routing_key): (&RawValue, Option<String>, Option<String>) =
        serde_json::from_slice(&record)?;
    let mut parts: Object<'_> = serde_json::from_str(envelope.get())?;
    let mut priority = 0;
    if let Some(headers) = parts.get_mut("headers") {
        *headers = Cow::Owned(with_true(headers, "redelivered")?);
    }
    if let Some(properties) = parts.get_mut("properties") {
        let mut inner: Object<'_> = serde_json::from_str(properties.get())?;
        priority = inner.get("priority").map_or(0, |raw| priority_of(raw));
        if let Some(info) = inner.get_mut("delivery_info") {
            *info = Cow::Owned(with_true(info, "redelivered")?);
            let changed = serde_json::value::to_raw_value(&inner)?;
            *properties = Cow::Owned(changed);
        }
    }
    Ok(Record {
        envelope: serde_json::to_string(&parts)?,
        exchange: exchange.unwrap_or_default(),
        routing_key: routing_key.unwrap_or_default(),
        priority,
    })
}

/// The record as it was taken: envelope and queue.
pub(crate) fn taken(record: &[u8]) -> Result<(Message, DeliveryInfo), Malformed> {
    let record = plain(record);
    let (envelope, _, queue): (&RawValue, Option<String>, Option<String>) = serde_json::from_slice(&record)?;
    read(envelope.get().as_bytes(), &queue.unwrap_or_default())
}

/// The object with one more member that is true; what is no object stays as it is.
fn with_true(object: &RawValue, member: &str) -> Result<Box<RawValue>, serde_json::Error> {
    if !object.get().starts_with('{') {
        return Ok(object.to_owned());
    }
    let mut members: Object<'_> = serde_json::from_str(object.get())?;
    members.insert(Cow::Borrowed(member), Cow::Owned(serde_json::value::to_raw_value(&true)?));
    serde_json::value::to_raw_value(&members)
}

/// As kombu: `int()`, held between 0 and 9; 0 for what is no number.
fn priority_of(raw: &RawValue) -> i64 {
    let number = match serde_json::from_str(raw.get()) {
        Ok(Value::Number(number)) => number.as_f64().unwrap_or(0.0),
        Ok(Value::String(text)) => text.trim().parse().unwrap_or(0.0),
        Ok(Value::Bool(true)) => 1.0,
        _ => 0.0,
    };
    number.clamp(0.0, 9.0) as i64
}

/// The same message marked as redelivered, as kombu's virtual channels mark it; everything else stays as it is.
/// (In Redis kombu marks the headers instead: [`restored`].)
///
/// # Errors
/// When the text is no message.
pub(crate) fn marked(text: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    fn owned(value: &Value) -> Result<Cow<'static, RawValue>, serde_json::Error> {
        serde_json::value::to_raw_value(value).map(Cow::Owned)
    }
    let mut envelope: IndexMap<String, &RawValue> = serde_json::from_slice(text)?;
    let mut properties: IndexMap<String, &RawValue> = match envelope.get("properties") {
        Some(properties) => serde_json::from_str(properties.get())?,
        None => IndexMap::new(),
    };
    let mut info: Map<String, Value> = properties
        .get("delivery_info")
        .and_then(|info| serde_json::from_str(info.get()).ok())
        .unwrap_or_default();
    info.insert("redelivered".to_owned(), json!(true));
    let info = owned(&Value::Object(info))?;
    properties.insert("delivery_info".to_owned(), &info);
    let properties = serde_json::value::to_raw_value(&properties)?;
    let marked = owned(&json!(true))?;
    envelope.insert("properties".to_owned(), &properties);
    envelope.insert("redelivered".to_owned(), &marked);
    serde_json::to_vec(&envelope)
}

/// The envelope of a message that is published, and its priority.
pub(crate) fn write(publication: &Publication, base64: bool) -> Result<(String, i64), Malformed> {
    let message = &publication.message;
    let body: Cow<'_, str> = if base64 {
        STANDARD.encode(&message.body).into()
    } else {
        std::str::from_utf8(&message.body)
            .map_err(|_| Malformed::Body { encoding: "utf-8".to_owned() })?
            .into()
    };
    let mut properties: IndexMap<String, Value> = serde_json::from_slice(message.properties.as_bytes())?;
    let mut info = match properties.shift_remove("delivery_info") {
        Some(Value::Object(info)) => info,
        _ => Map::new(),
    };
    info.insert("exchange".to_owned(), json!(publication.exchange));
    info.insert("routing_key".to_owned(), json!(publication.routing_key));
    if properties.get("priority").is_none_or(Value::is_null) {
        properties.insert("priority".to_owned(), json!(0));
    }
    let priority = priority_of(&serde_json::value::to_raw_value(&properties["priority"])?);
    properties.insert("delivery_info".to_owned(), Value::Object(info));
    properties.insert("body_encoding".to_owned(), json!(if base64 { "base64" } else { "utf-8" }));
    properties.insert("delivery_tag".to_owned(), json!(uuid::Uuid::new_v4().to_string()));
    let headers: &RawValue = serde_json::from_slice(message.headers.as_bytes())?;
    let mut parts: IndexMap<&str, Box<RawValue>> = IndexMap::new();
    parts.insert("body", serde_json::value::to_raw_value(&body)?);
    parts.insert("content-encoding", serde_json::value::to_raw_value(&message.content_encoding)?);
    parts.insert("content-type", serde_json::value::to_raw_value(&message.content_type)?);
    parts.insert("headers", headers.to_owned());
    parts.insert("properties", serde_json::value::to_raw_value(&properties)?);
    Ok((serde_json::to_string(&parts)?, priority))
}

#[cfg(test)]
mod tests {
    use super::*;

    // As kombu 5.7 published it, shortened.
    const ITEM: &str = r#"{"body": "W1sxLCAyXSwge30sIHt9XQ==", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", "task": "add", "id": "1", "eta": null, "list": [], "big": 12345678901234567890123, "float": 1.10}, "properties": {"correlation_id": "1", "reply_to": "r", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "celery"}, "priority": 6, "body_encoding": "base64", "delivery_tag": "t"}}"#;

    fn record(item: &str) -> Vec<u8> {
        format!(r#"[{item},"","celery"]"#).into_bytes()
    }

    #[test]
    fn an_envelope_of_kombu_is_read() {
        let (message, info) = read(ITEM.as_bytes(), "celery").unwrap();
        assert_eq!(&message.body[..], b"[[1, 2], {}, {}]");
        assert_eq!(message.content_type.as_deref(), Some("application/json"));
        assert_eq!(message.content_encoding.as_deref(), Some("utf-8"));
        assert!(message.headers.as_bytes().starts_with(br#"{"lang": "py""#));
        let expected = DeliveryInfo {
            exchange: String::new(),
            routing_key: "celery".to_owned(),
            redelivered: false,
            queue: "celery".to_owned(),
        };
        assert_eq!(info, expected);
    }

    #[test]
    fn a_restored_envelope_is_marked_twice_and_otherwise_the_same() {
        let restored = restored(&record(ITEM)).unwrap();
        assert_eq!((restored.exchange.as_str(), restored.routing_key.as_str()), ("", "celery"));
        assert_eq!(restored.priority, 6);
        assert!(
            restored
                .envelope
                .contains(r#""list":[],"big":12345678901234567890123,"float":1.10,"redelivered":true}"#)
        );
        let (message, info) = read(restored.envelope.as_bytes(), "celery").unwrap();
        assert!(info.redelivered);
        assert_eq!(&message.body[..], b"[[1, 2], {}, {}]");
    }

    #[test]
    fn marking_twice_changes_nothing_more() {
        let once = restored(&record(ITEM)).unwrap().envelope;
        assert_eq!(restored(&record(&once)).unwrap().envelope, once);
    }

    #[test]
    fn what_kombu_dies_of_is_an_error_and_nothing_else() {
        for item in [
            "",
            "garbage",
            "[]",
            "null",
            "{}",
            r#"{"body": "", "properties": []}"#,
            r#"{"body": {"a": 1}, "properties": {"body_encoding": "base64"}}"#,
            r#"{"body": "YQ", "properties": {"body_encoding": "base64"}}"#,
            r#"{"body": "YQ==", "properties": {"body_encoding": "rot13"}}"#,
            "{\"body\": \"\u{0}",
        ] {
            assert!(read(item.as_bytes(), "q").is_err(), "{item}");
        }
        assert!(read(b"\xff\xfe", "q").is_err());
    }

    #[test]
    fn a_missing_body_or_missing_headers_are_left_to_the_worker() {
        let (message, info) = read(br#"{"properties": {}}"#, "q").unwrap();
        assert!(message.body.is_empty());
        assert_eq!(message.headers, Json::empty());
        assert_eq!(info.routing_key, "q");
    }

    #[test]
    fn numbers_that_only_python_writes_do_not_cost_the_message() {
        let item = r#"{"body": "YQ==", "headers": {"x": NaN, "y": [-Infinity, "NaN \" NaN"]}, "properties": {"body_encoding": "base64"}}"#;
        let (message, _) = read(item.as_bytes(), "q").unwrap();
        assert_eq!(message.headers.value().unwrap(), json!({"x": null, "y": [null, "NaN \" NaN"]}));
        assert_eq!(&message.body[..], b"a");
    }

    #[test]
    fn a_published_envelope_reads_back_and_has_all_that_kombu_writes() {
        let (message, _) = read(ITEM.as_bytes(), "celery").unwrap();
        let publication = Publication {
            exchange: "ex".to_owned(),
            exchange_type: None,
            routing_key: "rk".to_owned(),
            message,
            declare: None,
        };
        let (text, priority) = write(&publication, true).unwrap();
        assert_eq!(priority, 6);
        let (message, info) = read(text.as_bytes(), "q").unwrap();
        assert_eq!(&message.body[..], b"[[1, 2], {}, {}]");
        assert_eq!((info.exchange.as_str(), info.routing_key.as_str()), ("ex", "rk"));
        let properties = message.properties.value().unwrap();
        assert_ne!(properties["delivery_tag"], json!("t"), "a fresh tag");
        assert_eq!(properties["correlation_id"], json!("1"));
        assert!(text.contains(r#""big": 12345678901234567890123"#));
    }

    #[test]
    fn marking_a_file_changes_nothing_else() {
        let once = marked(ITEM.as_bytes()).unwrap();
        let (before, _) = read(ITEM.as_bytes(), "q").unwrap();
        let (after, info) = read(&once, "q").unwrap();
        assert!(info.redelivered);
        assert_eq!((before.headers, before.body), (after.headers, after.body));
        assert_eq!(marked(&once).unwrap(), once);
    }

    #[test]
    fn an_unencoded_body_is_taken_as_it_is() {
        for encoding in ["\"utf-8\"", "null"] {
            let text = format!(r#"{{"body": "ä", "properties": {{"body_encoding": {encoding}}}}}"#);
            assert_eq!(read(text.as_bytes(), "q").unwrap().0.body, "ä".as_bytes());
        }
    }
}
