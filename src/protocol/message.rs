//! A task message: what travels, and the few headers that the supervisor reads.

use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The text of a JSON object or array, kept as it arrived and passed on as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Json(pub Bytes);

impl Json {
    /// An empty object.
    pub fn empty() -> Self {
        Self(Bytes::from_static(b"{}"))
    }

    /// The text of a value.
    pub fn of(value: &Value) -> Self {
        Self(Bytes::from(value.to_string()))
    }

    /// The text.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The value.
    ///
    /// # Errors
    /// When the text is not JSON.
    pub fn value(&self) -> Result<Value, serde_json::Error> {
        serde_json::from_slice(&self.0)
    }
}

/// A message as it travels: everything but the way to settle it. Never holds a connection.
#[derive(Clone, Debug)]
pub struct Message {
    /// MIME type of the body, absent on messages that do not say.
    pub content_type: Option<String>,
    /// Encoding of the body, `utf-8` or `binary` from Celery.
    pub content_encoding: Option<String>,
    /// The application headers, a JSON object; values that JSON lacks are in kombu's
    /// `{"__type__", "__value__"}` notation.
    pub headers: Json,
    /// The properties as kombu shows them (`correlation_id`, `reply_to`, `priority`, …), a JSON object.
    pub properties: Json,
    /// The body, transport encoding (base64) removed, compression and serialization not.
    pub body: Bytes,
}

/// Where a delivery came from; shown to tasks as `request.delivery_info`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeliveryInfo {
    /// Exchange it was published to, `""` for the default one.
    pub exchange: String,
    /// Routing key it was published with.
    pub routing_key: String,
    /// Whether the broker or a worker put it back before.
    pub redelivered: bool,
    /// Queue it was taken from.
    pub queue: String,
}

/// `[hard, soft]` in seconds, as the header `timelimit` has them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TimeLimits {
    /// The child is killed after this many seconds.
    pub hard: Option<f64>,
    /// `SoftTimeLimitExceeded` is raised in the task after this many seconds.
    pub soft: Option<f64>,
}

/// The headers of protocol 2 that decide what the supervisor does. All others are passed on unread.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TaskHeaders {
    /// Registered name of the task.
    pub task: String,
    /// Task id.
    pub id: String,
    /// Display name, used in logs and events when not empty.
    #[serde(default)]
    pub shadow: Option<String>,
    /// Id of the first task of the workflow.
    #[serde(default)]
    pub root_id: Option<String>,
    /// Id of the task that sent this one.
    #[serde(default)]
    pub parent_id: Option<String>,
    /// Id of the group that this task is a member of.
    #[serde(default)]
    pub group: Option<String>,
    /// Run at this time: ISO 8601.
    #[serde(default)]
    pub eta: Option<Value>,
    /// Do not run after this time: ISO 8601.
    #[serde(default)]
    pub expires: Option<Value>,
    /// How often it was retried.
    #[serde(default)]
    pub retries: Option<i64>,
    /// Limits of this message; they win over the task's.
    #[serde(default, deserialize_with = "timelimit")]
    pub timelimit: TimeLimits,
    /// Text of the positional arguments.
    #[serde(default)]
    pub argsrepr: Option<String>,
    /// Text of the keyword arguments.
    #[serde(default)]
    pub kwargsrepr: Option<String>,
    /// Whether the result is to be dropped; absent or null: as the task says.
    #[serde(default)]
    pub ignore_result: Option<bool>,
    /// How the body is compressed.
    #[serde(default)]
    pub compression: Option<serde::de::IgnoredAny>,
    /// Names of the stamps.
    #[serde(default)]
    pub stamped_headers: Option<Vec<String>>,
    /// When the broker got it, milliseconds since the epoch: RabbitMQ's interceptor sets it.
    #[serde(default)]
    pub timestamp_in_ms: Option<Value>,
    /// The trace that it belongs to, as the W3C writes it. Passed on; read for log lines.
    #[serde(default)]
    pub traceparent: Option<Value>,
    /// The stamps.
    #[serde(default)]
    pub stamps: Option<serde_json::Map<String, Value>>,
}

fn timelimit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TimeLimits, D::Error> {
    let pair = Option::<Vec<Option<f64>>>::deserialize(deserializer)?.unwrap_or_default();
    let at = |index: usize| pair.get(index).copied().flatten();
    Ok(TimeLimits { hard: at(0), soft: at(1) })
}

impl TaskHeaders {
    /// The name that logs and events show.
    pub fn display_name(&self) -> &str {
        self.shadow.as_deref().filter(|shadow| !shadow.is_empty()).unwrap_or(&self.task)
    }
}

/// What kind of message it is, judged by its headers alone.
#[derive(Debug)]
pub enum Kind {
    /// Protocol 2.
    Task(Box<TaskHeaders>),
    /// No `task` header: protocol 1, or not a task at all. The body tells.
    Bodied,
    /// A `task` header is there but the headers cannot be used; the reason.
    Malformed(String),
}

impl Message {
    /// Reads the headers.
    pub fn kind(&self) -> Kind {
        match serde_json::from_slice::<TaskHeaders>(self.headers.as_bytes()) {
            Ok(headers) => Kind::Task(Box::new(headers)),
            Err(error) => match self.headers.value() {
                Ok(Value::Object(map)) if map.contains_key("task") => Kind::Malformed(error.to_string()),
                _ => Kind::Bodied,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(headers: &str) -> Message {
        Message {
            content_type: Some("application/json".into()),
            content_encoding: Some("utf-8".into()),
            headers: Json(Bytes::copy_from_slice(headers.as_bytes())),
            properties: Json::empty(),
            body: Bytes::from_static(b"[[], {}, {}]"),
        }
    }

    #[test]
    fn a_message_with_task_and_id_is_protocol_2_and_absent_headers_have_their_defaults() {
        let Kind::Task(headers) = message(r#"{"task": "add", "id": "1", "timelimit": [3, null]}"#).kind()
        else {
            panic!("not a task")
        };
        assert_eq!((headers.task.as_str(), headers.id.as_str()), ("add", "1"));
        assert_eq!(headers.timelimit, TimeLimits { hard: Some(3.0), soft: None });
        assert_eq!(headers.retries, None);
    }

    #[test]
    fn a_task_header_without_id_is_malformed_and_no_task_header_is_left_to_the_body() {
        assert!(matches!(message(r#"{"task": "add"}"#).kind(), Kind::Malformed(_)));
        assert!(matches!(message(r#"{"lang": "py"}"#).kind(), Kind::Bodied));
        assert!(matches!(message("null").kind(), Kind::Bodied));
    }

    #[test]
    fn an_empty_shadow_does_not_hide_the_name() {
        let Kind::Task(headers) = message(r#"{"task": "add", "id": "1", "shadow": ""}"#).kind() else {
            panic!("not a task")
        };
        assert_eq!(headers.display_name(), "add");
    }
}
