//! The meta document, read by Celery itself.

use celeriac::protocol::TaskHeaders;
use celeriac::protocol::json;
use celeriac::protocol::result::{Exception, Extended, Meta, date};
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use crate::support::python::python;

/// Stores each line as a result and prints what `AsyncResult` says of it.
const READER: &str = r#"
import json, sys
from celery import Celery
app = Celery(broker="memory://", backend="cache+memory://")
for line in sys.argv[1].splitlines():
    document = json.loads(line)
    app.backend.set(app.backend.get_key_for_task(document["task_id"]), line.rstrip("\n"))
    result = app.AsyncResult(document["task_id"])
    value = result.result
    if isinstance(value, BaseException):
        value = [type(value).__module__, type(value).__qualname__, list(value.args)]
    print(json.dumps({
        "same": json.dumps(document) == line.rstrip("\n"),
        "state": result.state, "value": repr(value), "traceback": result.traceback,
        "date": result.date_done.isoformat() if result.date_done else None, "children": result.children,
        "name": result.name, "args": result.args, "kwargs": result.kwargs, "worker": result.worker,
        "retries": result.retries, "queue": result.queue,
        "group": result._get_task_meta().get("group_id"),
    }))
"#;

fn headers(id: &str) -> TaskHeaders {
    serde_json::from_value(json!({"task": "tasks.add", "id": id, "group": "g", "retries": 1})).unwrap()
}

#[test]
fn celery_reads_the_documents_as_its_own_and_would_print_them_the_same() {
    let Some(python) = python("celery") else { return };
    let done = date(1_795_341_086.25, &TimeZone::get("Europe/Berlin").unwrap());
    let odd = json::to_string(&("ü\u{1f600}\"\\\n", f64::NAN, 1e22, 0.1, i64::MIN, None::<u8>)).unwrap();
    let value_error = Exception::new("builtins", "ValueError", "it's bad");
    let ours = Exception::new("celeriac", "ParseIntError", "invalid digit");
    let limit = Exception::new("billiard.exceptions", "TimeLimitExceeded", 2.5);
    let cases = [
        ("1", "SUCCESS", odd.clone(), None),
        ("2", "FAILURE", value_error.document(), Some("Traceback…\nValueError: it's bad")),
        ("3", "FAILURE", ours.document(), Some("ParseIntError: invalid digit")),
        ("4", "FAILURE", limit.document(), None),
        ("5", "STARTED", r#"{"pid": 1}"#.to_owned(), None),
        ("6", "REVOKED", Exception::new("celery.exceptions", "TaskRevokedError", "revoked").document(), None),
    ];
    let mut lines = String::new();
    for (id, state, result, traceback) in &cases {
        let headers = headers(id);
        let meta = Meta {
            headers: &headers,
            state,
            result,
            traceback: *traceback,
            date_done: (*state != "STARTED").then_some(&done),
            extended: Some(Extended {
                args: Some("[4, 6]"),
                kwargs: Some("{}"),
                worker: "celery@tests",
                queue: "celery",
            }),
        };
        lines.push_str(&meta.document());
        lines.push('\n');
    }
    let printed = python.run(&["-c", READER, &lines]);
    let read: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(read.len(), cases.len());
    let values: Vec<&str> = read.iter().map(|row| row["value"].as_str().unwrap()).collect();
    assert_eq!(
        values,
        [
            r#"['ü😀"\\\n', nan, 1e+22, 0.1, -9223372036854775808, None]"#,
            r#"['builtins', 'ValueError', ["it's bad"]]"#,
            "['celery.exceptions', 'ParseIntError', ['invalid digit']]",
            "['billiard.exceptions', 'TimeLimitExceeded', [2.5]]",
            "{'pid': 1}",
            "['celery.exceptions', 'TaskRevokedError', ['revoked']]",
        ]
    );
    for ((_, state, _, traceback), row) in cases.iter().zip(&read) {
        assert_eq!(row["same"], true);
        assert_eq!(row["state"], *state);
        assert_eq!(row["traceback"], traceback.map_or(Value::Null, Value::from));
        let date = if *state == "STARTED" { Value::Null } else { done.clone().into() };
        assert_eq!(row["date"], date);
        assert_eq!(row["children"], json!([]));
        assert_eq!(
            (&row["name"], &row["args"], &row["worker"]),
            (&json!("tasks.add"), &json!([4, 6]), &json!("celery@tests"))
        );
        assert_eq!(
            (&row["retries"], &row["queue"], &row["group"]),
            (&json!(1), &json!("celery"), &json!("g"))
        );
    }
}
