//! A message as kombu's virtual transports write it: JSON with the body in base64.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::broker::Publication;
use crate::protocol::{DeliveryInfo, Json, Message};

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    body: Option<Cow<'a, str>>,
    #[serde(rename = "content-type", default)]
    content_type: Option<String>,
    #[serde(rename = "content-encoding", default)]
    content_encoding: Option<String>,
    #[serde(borrow, default)]
    headers: Option<&'a RawValue>,
    #[serde(borrow)]
    properties: &'a RawValue,
}

#[derive(Serialize)]
struct Outgoing<'a> {
    body: String,
    #[serde(rename = "content-encoding")]
    content_encoding: Option<&'a str>,
    #[serde(rename = "content-type")]
    content_type: Option<&'a str>,
    headers: &'a RawValue,
    properties: Map<String, Value>,
}

/// Reads a message taken from `queue`.
///
/// # Errors
/// The reason why the text is no message.
pub(super) fn read(text: &[u8], queue: &str) -> Result<(Message, DeliveryInfo), String> {
    let envelope: Envelope<'_> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let properties: Map<String, Value> =
        serde_json::from_str(envelope.properties.get()).map_err(|error| format!("properties: {error}"))?;
    let body = envelope.body.unwrap_or_default();
    let body = match properties.get("body_encoding").and_then(Value::as_str) {
        Some("base64") => STANDARD.decode(body.as_bytes()).map_err(|error| format!("body: {error}"))?,
        None => body.into_owned().into_bytes(),
        Some(encoding) if encoding.eq_ignore_ascii_case("utf-8") => body.into_owned().into_bytes(),
        Some(encoding) => return Err(format!("body: unknown encoding {encoding:?}")),
    };
    let info = properties.get("delivery_info");
    let text = |name: &str| {
        info.and_then(|info| info.get(name)).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let info = DeliveryInfo {
        exchange: text("exchange"),
        routing_key: text("routing_key"),
        redelivered: info.and_then(|info| info.get("redelivered")).and_then(Value::as_bool).unwrap_or(false),
        queue: queue.to_owned(),
    };
    let raw = |value: &RawValue| Json(Bytes::copy_from_slice(value.get().as_bytes()));
    let message = Message {
        content_type: envelope.content_type,
        content_encoding: envelope.content_encoding,
        // kombu takes null for no headers.
        headers: envelope.headers.filter(|headers| headers.get() != "null").map_or_else(Json::empty, raw),
        properties: raw(envelope.properties),
        body: Bytes::from(body),
    };
    Ok((message, info))
}

/// Writes a message under a delivery tag of its own.
///
/// # Errors
/// When headers or properties are no JSON objects.
pub(super) fn write(publication: &Publication, tag: &str) -> Result<Vec<u8>, serde_json::Error> {
    let message = &publication.message;
    let headers: &RawValue = serde_json::from_slice(message.headers.as_bytes())?;
    let mut properties: Map<String, Value> = serde_json::from_slice(message.properties.as_bytes())?;
    properties.entry("delivery_mode").or_insert_with(|| json!(2));
    properties.entry("priority").or_insert_with(|| json!(0));
    properties.insert("body_encoding".to_owned(), json!("base64"));
    properties.insert("delivery_tag".to_owned(), json!(tag));
    let info = json!({"exchange": publication.exchange, "routing_key": publication.routing_key});
    properties.insert("delivery_info".to_owned(), info);
    serde_json::to_vec(&Outgoing {
        body: STANDARD.encode(&message.body),
        content_encoding: message.content_encoding.as_deref(),
        content_type: message.content_type.as_deref(),
        headers,
        properties,
    })
}

/// The same message marked as redelivered, as kombu marks it; everything else stays as it is.
///
/// # Errors
/// When the text is no message.
pub(super) fn redelivered(text: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn publication() -> Publication {
        Publication {
            exchange: String::new(),
            exchange_type: None,
            routing_key: "q".to_owned(),
            message: Message {
                content_type: Some("application/json".to_owned()),
                content_encoding: Some("utf-8".to_owned()),
                headers: Json(Bytes::from_static(br#"{"id":  "1", "big": 12345678901234567890123}"#)),
                properties: Json(Bytes::from_static(br#"{"correlation_id": "1", "priority": 3}"#)),
                body: Bytes::from_static(b"\x00\xff body"),
            },
        }
    }

    #[test]
    fn what_is_written_is_read_back_with_its_headers_untouched() {
        let sent = publication();
        let (message, info) = read(&write(&sent, "tag").unwrap(), "q").unwrap();
        assert_eq!(message.headers, sent.message.headers);
        assert_eq!(message.body, sent.message.body);
        assert_eq!((info.routing_key.as_str(), info.redelivered), ("q", false));
        let properties = message.properties.value().unwrap();
        assert_eq!(
            (properties["priority"].as_u64(), properties["delivery_mode"].as_u64()),
            (Some(3), Some(2))
        );
    }

    #[test]
    fn marking_as_redelivered_changes_nothing_else() {
        let text = write(&publication(), "tag").unwrap();
        let marked = redelivered(&text).unwrap();
        let (before, _) = read(&text, "q").unwrap();
        let (after, info) = read(&marked, "q").unwrap();
        assert!(info.redelivered);
        assert_eq!((before.headers, before.body), (after.headers, after.body));
        assert_eq!(redelivered(&marked).unwrap(), marked);
    }

    #[test]
    fn an_unencoded_body_is_taken_as_it_is_and_an_unknown_encoding_refused() {
        let text =
            |encoding: &str| format!(r#"{{"body": "ä", "properties": {{"body_encoding": {encoding}}}}}"#);
        assert_eq!(read(text("\"utf-8\"").as_bytes(), "q").unwrap().0.body, "ä".as_bytes());
        assert_eq!(read(text("null").as_bytes(), "q").unwrap().0.body, "ä".as_bytes());
        assert!(read(text("\"rot13\"").as_bytes(), "q").is_err());
    }
}
