//! What becomes of a delivery: refused, or a request; and of a request: revoked, scheduled or run. Decides, does nothing.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::tz::TimeZone;

use super::hooks::Incident;
use super::request::{DATA, Request};
use crate::broker::{Delivery, Settlement};
use crate::config::{Config, TaskPolicy};
use crate::error::Error;
use crate::protocol::time::{self, TimeError};
use crate::protocol::v1::{self, V1Error};
use crate::protocol::{Kind, TaskHeaders, repr};

/// What the deliveries are judged by.
pub struct Rules {
    /// Registered tasks.
    pub tasks: HashMap<String, Arc<TaskPolicy>>,
    /// `accept_content`, MIME types.
    pub accept: Vec<String>,
    /// For times without offset.
    pub zone: TimeZone,
}

impl Rules {
    /// Those of a configuration.
    ///
    /// # Errors
    /// When the timezone is unknown.
    pub fn of(config: &Config) -> Result<Self, Error> {
        let zone = TimeZone::get(&config.timezone)
            .map_err(|error| Error::Config(format!("timezone {:?}: {error}", config.timezone)))?;
        let tasks = config.tasks.iter().map(|(name, policy)| (name.clone(), Arc::new(policy.clone())));
        Ok(Self { tasks: tasks.collect(), accept: config.accept_content.clone(), zone })
    }
}

/// What becomes of a delivery.
#[derive(Debug)]
pub enum Verdict {
    /// It is a request.
    Request(Box<Request>),
    /// It is reported, then settled.
    Refuse(Box<Refusal>),
}

/// A delivery that will not run.
#[derive(Debug)]
pub struct Refusal {
    /// The delivery.
    pub delivery: Delivery,
    /// What the parent reports.
    pub incident: Incident,
    /// What the broker is told.
    pub settlement: Settlement,
}

/// Judges a delivery, by its headers alone; by its body where it has no headers to judge by (protocol 1).
pub fn dispatch(mut delivery: Delivery, rules: &Rules) -> Verdict {
    let refuse = |delivery, incident, settlement| {
        Verdict::Refuse(Box::new(Refusal { delivery, incident, settlement }))
    };
    let rejected = |reason: Option<String>| Incident::Rejected { reason };
    let mut kind = delivery.message.kind();
    if matches!(kind, Kind::Bodied) || v1::may_be_hybrid(&delivery.message) {
        let content_type = delivery.message.content_type.as_deref().unwrap_or(DATA);
        if !accepts(&rules.accept, content_type) {
            let reason = untrusted(content_type);
            return refuse(delivery, rejected(Some(reason)), Settlement::Reject);
        }
        match v1::translate(&delivery.message) {
            Ok(message) => {
                kind = message.kind();
                delivery.message = message;
            }
            Err(V1Error::NotATask(_)) => return refuse(delivery, rejected(None), Settlement::Reject),
            Err(V1Error::Undecodable(reason)) => {
                return refuse(delivery, Incident::Undecodable { reason }, Settlement::Ack);
            }
            Err(V1Error::Malformed(reason)) => {
                return refuse(delivery, rejected(Some(reason)), Settlement::Reject);
            }
            Err(V1Error::Foreign) => return Verdict::Request(Box::new(Request::untranslated(delivery))),
        }
    }
    match kind {
        Kind::Task(headers) => match judge(&headers, &delivery, rules) {
            Ok((policy, eta, expires)) => Verdict::Request(Box::new(Request {
                headers,
                message: delivery.message,
                info: delivery.info,
                handle: delivery.handle,
                policy,
                eta,
                expires,
                bounced: false,
                ticket: None,
                series: None,
            })),
            Err((incident, settlement)) => refuse(delivery, incident, settlement),
        },
        // As in 5.7, which dies of it instead and finds it again after the restart: see "differences" in the README.
        Kind::Malformed(reason) => refuse(delivery, rejected(Some(reason)), Settlement::Reject),
        Kind::Bodied => refuse(delivery, rejected(None), Settlement::Reject),
    }
}

type Judged = (Arc<TaskPolicy>, Option<f64>, Option<f64>);

fn judge(
    headers: &TaskHeaders,
    delivery: &Delivery,
    rules: &Rules,
) -> Result<Judged, (Incident, Settlement)> {
    let invalid = |reason: String| (Incident::Rejected { reason: Some(reason) }, Settlement::Reject);
    let Some(policy) = rules.tasks.get(&headers.task) else {
        return Err((Incident::Unknown { task: headers.task.clone() }, Settlement::Reject));
    };
    let content_type = delivery.message.content_type.as_deref().unwrap_or(DATA);
    if !accepts(&rules.accept, content_type) {
        return Err(invalid(untrusted(content_type)));
    }
    let moment = |value: &Option<serde_json::Value>, what: &str| match value {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(value) => match time::parse(value, &rules.zone) {
            Ok(moment) => Ok(Some(moment)),
            Err(TimeError::OutOfRange) if what == "ETA" => {
                Err((Incident::BadEta { reason: TimeError::OutOfRange.to_string() }, Settlement::Reject))
            }
            Err(error) => {
                let shown = value.as_str().map_or_else(|| value.to_string(), repr::repr);
                Err(invalid(format!("invalid {what} value {shown}: {error}")))
            }
        },
    };
    Ok((policy.clone(), moment(&headers.eta, "ETA")?, moment(&headers.expires, "expires")?))
}

/// Whether a content type may be decoded. `application/data` and `application/text` always may, as in kombu.
pub fn accepts(accept: &[String], content_type: &str) -> bool {
    matches!(content_type, DATA | "application/text")
        || accept.iter().any(|accepted| accepted == content_type)
}

/// kombu's complaint; it names a content type by its alias and the type.
pub(super) fn untrusted(content_type: &str) -> String {
    let named = match content_type {
        "application/json" => "json (application/json)",
        "application/x-python-serialize" => "pickle (application/x-python-serialize)",
        "application/x-yaml" => "yaml (application/x-yaml)",
        "application/x-msgpack" => "msgpack (application/x-msgpack)",
        other => other,
    };
    format!("Refusing to deserialize untrusted content of type {named}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Handle;
    use crate::protocol::{DeliveryInfo, Json, Message};
    use bytes::Bytes;

    fn rules() -> Rules {
        Rules {
            tasks: HashMap::from([("add".to_owned(), Arc::new(TaskPolicy::default()))]),
            accept: vec!["application/json".to_owned()],
            zone: TimeZone::UTC,
        }
    }

    fn judged(headers: &str, content_type: &str) -> (String, Option<Settlement>) {
        let delivery = Delivery {
            message: Message {
                content_type: Some(content_type.to_owned()),
                content_encoding: None,
                headers: Json(Bytes::copy_from_slice(headers.as_bytes())),
                properties: Json::empty(),
                body: Bytes::from_static(b"[[], {}, {}]"),
            },
            info: DeliveryInfo::default(),
            handle: Handle::new(1),
        };
        match dispatch(delivery, &rules()) {
            Verdict::Request(request) => {
                let said = format!("run eta={:?} expires={:?}", request.eta, request.expires);
                request.handle.abandon();
                (said, None)
            }
            Verdict::Refuse(refusal) => {
                refusal.delivery.handle.abandon();
                (format!("{:?}", refusal.incident), Some(refusal.settlement))
            }
        }
    }

    #[test]
    fn bad_messages_are_settled_as_celery_settles_them() {
        let json = "application/json";
        for (headers, content_type, says, settlement) in [
            (r#"{"task": "add", "id": "1"}"#, json, "run eta=None", None),
            (r#"{"task": "add", "id": "1", "eta": "2026-11-22T00:00:00Z"}"#, json, "run eta=Some(17", None),
            (r#"{"task": "no", "id": "1"}"#, json, "Unknown { task: \"no\"", Some(Settlement::Reject)),
            (r#"{"task": "add"}"#, json, "missing field `id`", Some(Settlement::Reject)),
            (r#"{}"#, json, "Rejected { reason: None", Some(Settlement::Reject)),
            (r#"null"#, json, "Rejected { reason: None", Some(Settlement::Reject)),
            (
                r#"{"task": "add", "id": "1", "eta": "soon"}"#,
                json,
                "invalid ETA value",
                Some(Settlement::Reject),
            ),
            (
                r#"{"task": "add", "id": "1", "expires": 1}"#,
                json,
                "invalid expires value",
                Some(Settlement::Reject),
            ),
            (
                r#"{"task": "add", "id": "1", "eta": "0001-01-01T00:00:00+14:00"}"#,
                json,
                "BadEta",
                Some(Settlement::Reject),
            ),
            (
                r#"{"task": "add", "id": "1"}"#,
                "application/x-python-serialize",
                "untrusted content of type pickle (application/x-python-serialize)",
                Some(Settlement::Reject),
            ),
            (r#"{"task": "add", "id": "1"}"#, "application/data", "run", None),
        ] {
            let (said, told) = judged(headers, content_type);
            assert!(said.contains(says), "{headers}: {said}");
            assert_eq!(told, settlement, "{headers}");
        }
    }
}
