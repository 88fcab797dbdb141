//! A [`Message`] from what lapin delivers, and what lapin publishes from a [`Message`].

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::FieldTable;
use serde_json::{Map, Value};

use super::fault::{Fault, short};
use super::table;
use crate::protocol::{Json, Message};

/// The message of a delivery. The body's bytes are taken over, not copied.
pub(super) fn received(properties: &BasicProperties, body: Vec<u8>) -> Message {
    let text = |text: &Option<lapin::types::ShortString>| text.as_ref().map(|text| text.as_str().to_owned());
    Message {
        content_type: text(properties.content_type()),
        content_encoding: text(properties.content_encoding()),
        headers: match properties.headers() {
            Some(table) => Json(Bytes::from(table::to_json(table))),
            None => Json::empty(),
        },
        properties: Json::of(&Value::Object(shown(properties))),
        body: Bytes::from(body),
    }
}

/// The properties that are there, under kombu's names. Headers are not repeated here.
fn shown(properties: &BasicProperties) -> Map<String, Value> {
    let mut map = Map::new();
    for (name, value) in [
        ("content_type", properties.content_type()),
        ("content_encoding", properties.content_encoding()),
        ("correlation_id", properties.correlation_id()),
        ("reply_to", properties.reply_to()),
        ("expiration", properties.expiration()),
        ("message_id", properties.message_id()),
        ("type", properties.kind()),
        ("user_id", properties.user_id()),
        ("app_id", properties.app_id()),
        ("cluster_id", properties.cluster_id()),
    ] {
        if let Some(value) = value {
            map.insert(name.to_owned(), Value::from(value.as_str()));
        }
    }
    for (name, value) in [
        ("delivery_mode", properties.delivery_mode().map(u64::from)),
        ("priority", properties.priority().map(u64::from)),
        ("timestamp", *properties.timestamp()),
    ] {
        if let Some(value) = value {
            map.insert(name.to_owned(), Value::from(value));
        }
    }
    map
}

/// The properties to publish a message with. What is absent or of a wrong type is not sent.
pub(super) fn to_send(message: &Message) -> Result<BasicProperties, Fault> {
    let empty = Map::new();
    let (headers, given) = (message.headers.value().ok(), message.properties.value().ok());
    let headers = headers.as_ref().and_then(Value::as_object).unwrap_or(&empty);
    let given = given.as_ref().and_then(Value::as_object).unwrap_or(&empty);
    let text = |name: &str| given.get(name).and_then(Value::as_str).map(short).transpose();
    let octet =
        |name: &str| given.get(name).and_then(Value::as_u64).and_then(|value| u8::try_from(value).ok());

    let headers = if headers.is_empty() { FieldTable::default() } else { table::from_json(headers) };
    let mut properties = BasicProperties::default().with_headers(headers);
    if let Some(value) = &message.content_type {
        properties = properties.with_content_type(short(value)?);
    }
    if let Some(value) = &message.content_encoding {
        properties = properties.with_content_encoding(short(value)?);
    }
    if let Some(value) = octet("delivery_mode") {
        properties = properties.with_delivery_mode(value);
    }
    if let Some(value) = octet("priority") {
        properties = properties.with_priority(value);
    }
    if let Some(value) = given.get("timestamp").and_then(Value::as_u64) {
        properties = properties.with_timestamp(value);
    }
    if let Some(value) = text("correlation_id")? {
        properties = properties.with_correlation_id(value);
    }
    if let Some(value) = text("reply_to")? {
        properties = properties.with_reply_to(value);
    }
    if let Some(value) = text("expiration")? {
        properties = properties.with_expiration(value);
    }
    if let Some(value) = text("message_id")? {
        properties = properties.with_message_id(value);
    }
    if let Some(value) = text("type")? {
        properties = properties.with_type(value);
    }
    if let Some(value) = text("app_id")? {
        properties = properties.with_app_id(value);
    }
    Ok(properties)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_properties_that_are_there_are_shown_and_a_round_trip_keeps_them() {
        let given = json!({"correlation_id": "id", "reply_to": "", "delivery_mode": 2, "priority": 0, "expiration": "9"});
        let message = Message {
            content_type: Some("application/json".into()),
            content_encoding: Some("utf-8".into()),
            headers: Json::of(&json!({"task": "add", "timelimit": [null, 3]})),
            properties: Json::of(&given),
            body: Bytes::from_static(b"[]"),
        };
        let back = received(&to_send(&message).unwrap(), b"[]".to_vec());
        assert_eq!(back.headers.value().unwrap(), message.headers.value().unwrap());
        assert_eq!(back.content_encoding.as_deref(), Some("utf-8"));
        let mut shown = back.properties.value().unwrap();
        let shown = shown.as_object_mut().unwrap();
        assert_eq!(shown.remove("content_type"), Some(json!("application/json")));
        assert_eq!(shown.remove("content_encoding"), Some(json!("utf-8")));
        assert_eq!(Value::Object(shown.clone()), given);
    }

    #[test]
    fn a_message_without_headers_has_an_empty_object_and_one_too_long_for_amqp_is_an_error() {
        assert_eq!(received(&BasicProperties::default(), Vec::new()).headers, Json::empty());
        let mut message = received(&BasicProperties::default(), Vec::new());
        message.properties = Json::of(&json!({"reply_to": "x".repeat(256)}));
        assert!(to_send(&message).is_err());
    }
}
