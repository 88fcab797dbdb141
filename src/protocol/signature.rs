//! From a signature to the message that Celery would send for it: what continues a task.
//!
//! All that depends on the called task alone (its route, its options, Celery's version) comes as a [`Target`], which
//! is Celery's own message of an empty call. A [`Call`] is one use of it: arguments and options as JSON text, which
//! go into headers and body as they came.

use std::borrow::Cow;

use bytes::Bytes;
use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{self, JsonError};
use super::{Json, Message, repr};

/// The message of an empty call of a task, protocol 2, and how its arguments are shown.
#[derive(Clone, Debug, Deserialize)]
pub struct Target {
    headers: IndexMap<String, Box<RawValue>>,
    properties: IndexMap<String, Box<RawValue>>,
    content_type: String,
    content_encoding: String,
    /// Longest `argsrepr`.
    argsrepr_maxsize: usize,
    /// Longest `kwargsrepr`.
    kwargsrepr_maxsize: usize,
    /// `task_repr_maxlevels`.
    repr_maxlevels: usize,
}

/// One call. Texts are JSON as Python prints it.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Task id.
    pub id: &'a str,
    /// Where an rpc result goes.
    pub reply_to: &'a str,
    /// Positional arguments, an array.
    pub args: &'a str,
    /// Whether they are shown as a tuple: so they are where the result of the parent was put before them.
    pub tuple: bool,
    /// Keyword arguments, an object.
    pub kwargs: &'a str,
    /// What was said to `apply_async` beside the arguments, an object.
    pub options: &'a str,
}

/// Options that are headers of the same or another name, given as they are.
const PLAIN: [(&str, &str); 8] = [
    ("shadow", "shadow"),
    ("group_id", "group"),
    ("group_index", "group_index"),
    ("retries", "retries"),
    ("root_id", "root_id"),
    ("parent_id", "parent_id"),
    ("ignore_result", "ignore_result"),
    ("replaced_task_nesting", "replaced_task_nesting"),
];

/// Options that are parts of the body's third item, and whether one alone becomes a list.
const EMBEDDED: [(&str, &str, bool); 4] = [
    ("link", "callbacks", true),
    ("link_error", "errbacks", true),
    ("chain", "chain", false),
    ("chord", "chord", false),
];

impl Target {
    /// The message of a call.
    ///
    /// # Errors
    /// When a text of the call is not the JSON that it is to be, or holds what no header can.
    pub fn message(&self, call: &Call<'_>) -> Result<Message, JsonError> {
        let options = json::members(call.options)?;
        Ok(Message {
            content_type: Some(self.content_type.clone()),
            content_encoding: Some(self.content_encoding.clone()),
            headers: self.headers(call, &options)?,
            properties: self.properties(call, &options)?,
            body: body(call, &options)?,
        })
    }

    fn headers(&self, call: &Call<'_>, options: &IndexMap<String, &str>) -> Result<Json, JsonError> {
        let mut headers: IndexMap<&str, Cow<'_, str>> =
            self.headers.iter().map(|(name, value)| (name.as_str(), Cow::Borrowed(value.get()))).collect();
        headers.insert("id", json::to_string(call.id)?.into());
        for (option, header) in PLAIN {
            if let Some(value) = options.get(option) {
                headers.insert(header, checked(value)?.into());
            }
        }
        if options.contains_key("time_limit") || options.contains_key("soft_time_limit") {
            let given: Vec<Cow<'_, str>> = match headers.get("timelimit") {
                Some(limits) => {
                    json::elements(limits)?.into_iter().map(|one| one.to_owned().into()).collect()
                }
                None => Vec::new(),
            };
            let limit = |index: usize, option: &str| {
                options.get(option).copied().or(given.get(index).map(AsRef::as_ref)).unwrap_or("null")
            };
            let limits = format!("[{}, {}]", limit(0, "time_limit"), limit(1, "soft_time_limit"));
            headers.insert("timelimit", limits.into());
        }
        let levels = self.repr_maxlevels;
        let args = if call.tuple || json::elements(call.args)?.is_empty() {
            repr::saferepr_tuple(call.args, Some(self.argsrepr_maxsize), levels)
        } else {
            repr::saferepr(call.args, Some(self.argsrepr_maxsize), levels)
        };
        let kwargs = repr::saferepr(call.kwargs, Some(self.kwargsrepr_maxsize), levels);
        headers.insert("argsrepr", json::to_string(&args?)?.into());
        headers.insert("kwargsrepr", json::to_string(&kwargs?)?.into());
        if let Some(names) = options.get("stamped_headers") {
            let mut stamps = IndexMap::new();
            if *names != "null" {
                for name in serde_json::from_str::<Vec<String>>(names)? {
                    if let Some(value) = options.get(&name) {
                        stamps.insert(name, Cow::Borrowed(checked(value)?));
                    }
                }
            }
            headers.insert("stamped_headers", checked(names)?.into());
            headers
                .insert("stamps", object(stamps.iter().map(|(name, value)| (name.as_str(), value))).into());
        }
        // Celery's last step: the caller's own headers go over all others.
        let own = options.get("headers").filter(|own| **own != "null").map(|own| json::members(own));
        let own = own.transpose()?.unwrap_or_default();
        for (name, value) in &own {
            headers.insert(name, checked(value)?.into());
        }
        Ok(Json(Bytes::from(object(headers.iter().map(|(name, value)| (*name, value))))))
    }

    fn properties(&self, call: &Call<'_>, options: &IndexMap<String, &str>) -> Result<Json, JsonError> {
        let mut properties: IndexMap<&str, Cow<'_, str>> =
            self.properties.iter().map(|(name, value)| (name.as_str(), value.get().into())).collect();
        properties.insert("correlation_id", json::to_string(call.id)?.into());
        properties.insert("reply_to", json::to_string(call.reply_to)?.into());
        if let Some(priority) = options.get("priority").filter(|priority| **priority != "null") {
            properties.insert("priority", checked(priority)?.into());
        }
        Ok(Json(Bytes::from(object(properties.iter().map(|(name, value)| (*name, value))))))
    }
}

/// JSON by the standard: a header with `NaN` can be read by nobody else.
fn checked(text: &str) -> Result<&str, JsonError> {
    let _: &RawValue = serde_json::from_str(text)?;
    Ok(text)
}

fn object<'a>(members: impl Iterator<Item = (&'a str, &'a Cow<'a, str>)>) -> String {
    let mut out = String::from("{");
    for (name, value) in members {
        if out.len() > 1 {
            out.push_str(", ");
        }
        json::write_string(&mut out, name);
        out.push_str(": ");
        out.push_str(value);
    }
    out.push('}');
    out
}

fn body(call: &Call<'_>, options: &IndexMap<String, &str>) -> Result<Bytes, JsonError> {
    let parts = EMBEDDED.map(|(option, name, list)| {
        let value: Cow<'_, str> = match options.get(option) {
            None => "null".into(),
            Some(one) if list && *one != "null" && !one.starts_with('[') => format!("[{one}]").into(),
            Some(value) => (*value).into(),
        };
        (name, value)
    });
    // What a reader could not take apart again must not be sent.
    json::members(call.kwargs)?;
    let embed = object(parts.iter().map(|(name, value)| (*name, value)));
    Ok(Bytes::from(format!("[{}, {}, {embed}]", call.args, call.kwargs)))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        name: String,
        target: Box<RawValue>,
        id: String,
        reply_to: String,
        args: String,
        tuple: bool,
        kwargs: String,
        options: String,
        headers: Value,
        properties: Value,
        body: String,
    }

    #[test]
    fn recorded_calls_become_the_messages_that_celery_sent() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/messages/signatures.json")).unwrap();
        assert!(cases.len() > 25);
        for case in cases {
            let target: Target = serde_json::from_str(case.target.get()).unwrap();
            let call = Call {
                id: &case.id,
                reply_to: &case.reply_to,
                args: &case.args,
                tuple: case.tuple,
                kwargs: &case.kwargs,
                options: &case.options,
            };
            let message = target.message(&call).unwrap();
            let headers = message.headers.value().unwrap();
            assert_eq!(headers, case.headers, "{}", case.name);
            let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(&headers), names(&case.headers), "{}: also in Celery's order", case.name);
            assert_eq!(message.properties.value().unwrap(), case.properties, "{}", case.name);
            assert_eq!(std::str::from_utf8(&message.body).unwrap(), case.body, "{}", case.name);
        }
    }

    #[test]
    fn what_no_header_or_body_can_hold_is_an_error() {
        let target: Target = serde_json::from_str(
            r#"{"headers": {}, "properties": {}, "content_type": "application/json", "content_encoding": "utf-8",
                "argsrepr_maxsize": 9, "kwargsrepr_maxsize": 9, "repr_maxlevels": 3}"#,
        )
        .unwrap();
        let call = Call { id: "1", reply_to: "", args: "[]", tuple: true, kwargs: "{}", options: "{}" };
        assert!(target.message(&call).is_ok());
        for call in [
            Call { args: "{}", ..call },
            Call { args: r#"["\ud800"]"#, ..call },
            Call { kwargs: "[]", ..call },
            Call { options: "[]", ..call },
            Call { options: r#"{"headers": {"a": NaN}}"#, ..call },
            Call { options: r#"{"headers": 3}"#, ..call },
            Call { options: r#"{"stamped_headers": [1]}"#, ..call },
        ] {
            assert!(target.message(&call).is_err(), "{call:?}");
        }
    }
}
