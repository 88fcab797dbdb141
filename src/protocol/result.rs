//! The meta document of a result, for tasks that ran in Rust and for what the parent reports of them: the JSON text
//! that Celery's backends store, member by member in their order.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::{TaskHeaders, json, repr};

/// An exception as JSON backends store it. Python gives its reader the class `module.kind` where that is imported
/// and an exception, else a class made for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exception {
    /// `__qualname__` of the class.
    pub kind: String,
    /// `__module__` of the class.
    pub module: String,
    /// The arguments that it was made with.
    pub arguments: Vec<Value>,
}

impl Exception {
    /// An exception with one argument.
    pub fn new(module: &str, kind: &str, argument: impl Into<Value>) -> Self {
        Self { kind: kind.to_owned(), module: module.to_owned(), arguments: vec![argument.into()] }
    }

    /// `{"exc_type", "exc_message", "exc_module"}`.
    pub fn document(&self) -> String {
        let mut out = String::from(r#"{"exc_type": "#);
        json::write_string(&mut out, &self.kind);
        out.push_str(r#", "exc_message": "#);
        out.push_str(&text(&self.arguments));
        out.push_str(r#", "exc_module": "#);
        json::write_string(&mut out, &self.module);
        out.push('}');
        out
    }

    /// Python's `repr`, as logs and events show it.
    pub fn repr(&self) -> String {
        let arguments: Vec<String> = self
            .arguments
            .iter()
            .map(|argument| match argument {
                Value::String(text) => repr::repr(text),
                other => repr::saferepr(&text(other), None, repr::LEVELS).unwrap_or_default(),
            })
            .collect();
        format!("{}({})", self.kind, arguments.join(", "))
    }

    /// The last line of a Python traceback: `ValueError: too large`.
    pub fn line(&self) -> String {
        let name = match self.module.as_str() {
            "builtins" => self.kind.clone(),
            module => format!("{module}.{}", self.kind),
        };
        match self.arguments.as_slice() {
            [] => name,
            [Value::String(text)] => format!("{name}: {text}"),
            [other] => {
                format!("{name}: {}", repr::saferepr(&text(other), None, repr::LEVELS).unwrap_or_default())
            }
            several => {
                let shown = repr::saferepr(&text(several), None, repr::LEVELS).unwrap_or_default();
                format!("{name}: ({})", shown.trim_start_matches('[').trim_end_matches(']'))
            }
        }
    }
}

/// A value of ours as JSON text; nothing in it can refuse.
fn text<T: serde::Serialize + ?Sized>(value: &T) -> String {
    json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

/// What `result_extended` adds.
#[derive(Clone, Debug, Default)]
pub struct Extended<'a> {
    /// JSON text of the positional arguments, where they could be read.
    pub args: Option<&'a str>,
    /// JSON text of the keyword arguments.
    pub kwargs: Option<&'a str>,
    /// Node name.
    pub worker: &'a str,
    /// Routing key that the message came with.
    pub queue: &'a str,
}

/// A meta document before it is text.
#[derive(Clone, Debug)]
pub struct Meta<'a> {
    /// The task.
    pub headers: &'a TaskHeaders,
    /// State.
    pub state: &'a str,
    /// JSON text of the result, or of [`Exception::document`].
    pub result: &'a str,
    /// Traceback of a failure.
    pub traceback: Option<&'a str>,
    /// When it was done, for the states that end a task: [`date`].
    pub date_done: Option<&'a str>,
    /// `result_extended`.
    pub extended: Option<Extended<'a>>,
}

/// The states that end a task.
pub fn is_ready(state: &str) -> bool {
    matches!(state, "SUCCESS" | "FAILURE" | "REVOKED")
}

impl Meta<'_> {
    /// The JSON text.
    pub fn document(&self) -> String {
        let mut out = Members(String::with_capacity(192 + self.result.len()));
        out.text("status", self.state);
        out.raw("result", self.result);
        out.maybe("traceback", self.traceback);
        out.raw("children", "[]");
        out.maybe("date_done", self.date_done);
        let given = |id: &'_ Option<String>| id.clone().filter(|id| !id.is_empty());
        if let Some(group) = given(&self.headers.group) {
            out.text("group_id", &group);
        }
        if let Some(parent) = given(&self.headers.parent_id) {
            out.text("parent_id", &parent);
        }
        if let Some(extended) = &self.extended {
            out.text("name", &self.headers.task);
            out.raw("args", extended.args.unwrap_or("null"));
            out.raw("kwargs", extended.kwargs.unwrap_or("null"));
            out.text("worker", extended.worker);
            out.raw("retries", &self.headers.retries.unwrap_or(0).to_string());
            out.text("queue", extended.queue);
            out.stamps(self.headers);
        }
        out.text("task_id", &self.headers.id);
        out.0 + "}"
    }
}

struct Members(String);

impl Members {
    fn raw(&mut self, key: &str, value: &str) {
        self.0.push_str(if self.0.is_empty() { "{" } else { ", " });
        json::write_string(&mut self.0, key);
        self.0.push_str(": ");
        self.0.push_str(value);
    }

    fn text(&mut self, key: &str, value: &str) {
        self.raw(key, &text(value));
    }

    fn maybe(&mut self, key: &str, value: Option<&str>) {
        self.raw(key, &text(&value));
    }

    fn stamps(&mut self, headers: &TaskHeaders) {
        let none = Map::new();
        let stamps = headers.stamps.as_ref().unwrap_or(&none);
        if stamps.is_empty() {
            return;
        }
        let names = headers.stamped_headers.as_deref().unwrap_or_default();
        self.raw("stamped_headers", &text(names));
        for (name, value) in stamps.iter().filter(|(name, _)| names.contains(name)) {
            self.raw(name, &text(value));
        }
    }
}

/// A moment (seconds since the epoch) in a timezone as Python's `isoformat` gives it.
pub fn date(moment: f64, zone: &TimeZone) -> String {
    let micros = (moment * 1e6).round() as i64;
    let zoned = Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH).to_zoned(zone.clone());
    // As Python: no fraction where there are no microseconds, and an offset in hours and minutes.
    let form =
        if micros.rem_euclid(1_000_000) == 0 { "%Y-%m-%dT%H:%M:%S%:z" } else { "%Y-%m-%dT%H:%M:%S%.6f%:z" };
    zoned.strftime(form).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn headers(more: Value) -> TaskHeaders {
        let mut headers = json!({"task": "tasks.add", "id": "i"});
        headers.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(headers).unwrap()
    }

    #[test]
    fn a_document_has_the_members_and_the_order_of_a_recorded_one() {
        let headers = headers(json!({"group": "g", "parent_id": "p", "retries": 2,
            "stamped_headers": ["k"], "stamps": {"k": ["v"], "undeclared": 1}}));
        let meta = Meta {
            headers: &headers,
            state: "SUCCESS",
            result: "3",
            traceback: None,
            date_done: Some("2026-11-22T09:49:52.655368+00:00"),
            extended: Some(Extended {
                args: Some("[1, 2]"),
                kwargs: Some("{}"),
                worker: "celery@vm",
                queue: "celery",
            }),
        };
        let expected = r#"{"status": "SUCCESS", "result": 3, "traceback": null, "children": [], "#.to_owned()
            + r#""date_done": "2026-11-22T09:49:52.655368+00:00", "group_id": "g", "parent_id": "p", "#
            + r#""name": "tasks.add", "args": [1, 2], "kwargs": {}, "worker": "celery@vm", "retries": 2, "#
            + r#""queue": "celery", "stamped_headers": ["k"], "k": ["v"], "task_id": "i"}"#;
        assert_eq!(meta.document(), expected);
    }

    #[test]
    fn an_unfinished_state_has_no_date_and_absent_ids_no_members() {
        let headers = headers(json!({"group": "", "parent_id": null}));
        let started = Meta {
            headers: &headers,
            state: "STARTED",
            result: r#"{"pid": 1}"#,
            traceback: None,
            date_done: None,
            extended: None,
        };
        assert_eq!(
            started.document(),
            r#"{"status": "STARTED", "result": {"pid": 1}, "traceback": null, "children": [], "date_done": null, "task_id": "i"}"#
        );
        assert!(!is_ready("STARTED") && is_ready("REVOKED"));
    }

    #[test]
    fn exceptions_are_stored_and_shown_as_pythons() {
        let error = Exception::new("builtins", "ValueError", "it's \u{fc}");
        assert_eq!(
            error.document(),
            r#"{"exc_type": "ValueError", "exc_message": ["it's \u00fc"], "exc_module": "builtins"}"#
        );
        assert_eq!(
            (error.repr().as_str(), error.line().as_str()),
            ("ValueError(\"it's ü\")", "ValueError: it's ü")
        );
        let limit = Exception::new("billiard.exceptions", "TimeLimitExceeded", 2.5);
        assert_eq!(limit.repr(), "TimeLimitExceeded(2.5)");
        let bare = Exception { kind: "E".into(), module: "m".into(), arguments: Vec::new() };
        assert_eq!((bare.repr().as_str(), bare.line().as_str()), ("E()", "m.E"));
    }

    #[test]
    fn dates_are_pythons_iso_format() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        for (moment, zone, expected) in [
            (1_795_341_086.150_807, &TimeZone::UTC, "2026-11-22T09:51:26.150807+00:00"),
            (1_795_341_086.0, &TimeZone::UTC, "2026-11-22T09:51:26+00:00"),
            (1_795_341_086.000_001, &berlin, "2026-11-22T10:51:26.000001+01:00"),
            (1_782_900_000.5, &berlin, "2026-07-01T12:00:00.500000+02:00"),
        ] {
            assert_eq!(date(moment, zone), expected);
        }
    }
}
