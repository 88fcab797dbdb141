//! Jobs in, events out.

use std::time::Duration;

use bytes::Bytes;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::*;
use crate::native::{Args, Handler, Params};
use crate::protocol::{DeliveryInfo, Json};

async fn add(Args((x, y)): Args<(i64, i64)>) -> Result<i64, TaskError> {
    Ok(x + y)
}

#[derive(serde::Deserialize)]
struct Named {
    #[expect(dead_code, reason = "only bound")]
    name: String,
}

async fn named(Params(_): Params<Named>) -> Result<(), TaskError> {
    Ok(())
}

async fn fail() -> Result<(), TaskError> {
    Err(TaskError::new("shop.errors.SoldOut", "none left"))
}

async fn panics() -> Result<(), TaskError> {
    panic!("a bug")
}

async fn forever() -> Result<(), TaskError> {
    std::future::pending().await
}

fn task<M: 'static>(handler: impl Handler<M>) -> Task {
    Task { run: Box::new(move |call| handler.call(call)), ignore_result: false }
}

fn app() -> App {
    let tasks = [
        ("add", task(add)),
        ("named", task(named)),
        ("fail", task(fail)),
        ("panics", task(panics)),
        ("forever", task(forever)),
        ("quiet", Task { ignore_result: true, ..task(fail) }),
    ];
    App {
        tasks: tasks.into_iter().map(|(name, task)| (name.to_owned(), task)).collect(),
        states: Arc::default(),
        results: Some(Results {
            zone: TimeZone::UTC,
            node: "celery@tests".into(),
            extended: true,
            expires: Some(Duration::from_secs(60)),
            rpc: false,
        }),
        node: "celery@tests".into(),
    }
}

fn job(id: JobId, task: &str, body: &str) -> Job {
    Job {
        id,
        task: task.to_owned(),
        task_id: format!("id-{id}"),
        headers: Json::of(&json!({"task": task, "id": format!("id-{id}")})),
        properties: Json::empty(),
        info: DeliveryInfo { routing_key: "celery".into(), ..DeliveryInfo::default() },
        body: Bytes::copy_from_slice(body.as_bytes()),
        content_type: "application/json".into(),
        content_encoding: "utf-8".into(),
        acks_early: true,
        work: crate::pool::Work::Message,
        hints: crate::pool::Hints::default(),
    }
}

async fn event(running: &mut Running) -> Event {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(30), running.events.recv()).await;
        match event.expect("an event comes").expect("the channel is open") {
            Event::Up { .. } => {}
            event => return event,
        }
    }
}

/// Runs one job: what was stored, and how it ended.
async fn one(task: &str, body: &str) -> (Option<Value>, Outcome) {
    let mut running = start(app(), 1);
    running.pool.submit(job(1, task, body)).unwrap();
    let mut stored = None;
    loop {
        match event(&mut running).await {
            Event::Accepted { job: 1 } => {}
            Event::Store { job: 1, record, confirm: None } => {
                assert_eq!(record.expires, Some(Duration::from_secs(60)));
                stored = Some(serde_json::from_slice(&record.document).unwrap());
            }
            Event::Ended { job: 1, outcome } => {
                assert_eq!(running.pool.idle(), 1);
                return (stored, outcome);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_result_is_stored_before_the_end_is_told() {
    let (stored, outcome) = one("add", "[[4, 6], {}, {}]").await;
    let stored = stored.unwrap();
    assert_eq!(
        (&stored["status"], &stored["result"], &stored["task_id"]),
        (&json!("SUCCESS"), &json!(10), &json!("id-1"))
    );
    assert_eq!((&stored["args"], &stored["queue"]), (&json!([4, 6]), &json!("celery")));
    assert!(matches!(outcome, Outcome::Success { result, .. } if result == "10"));
}

#[tokio::test]
async fn failures_are_stored_as_python_would_store_them() {
    let sold_out = json!({"exc_type": "SoldOut", "exc_message": ["none left"], "exc_module": "shop.errors"});
    let count = "add() takes 2 positional arguments but 1 was given";
    let keyword = "named() got an unexpected keyword argument 'x'";
    let chain = "native tasks do not continue workflows yet (chain); the task was not run";
    for (task, body, exception) in [
        ("fail", "[[], {}, {}]", sold_out),
        (
            "panics",
            "[[], {}, {}]",
            json!({"exc_type": "Panic", "exc_message": ["a bug"], "exc_module": "celeriac"}),
        ),
        (
            "add",
            "[[1], {}, {}]",
            json!({"exc_type": "TypeError", "exc_message": [count], "exc_module": "builtins"}),
        ),
        (
            "named",
            r#"[["a"], {"x": 1}, {}]"#,
            json!({"exc_type": "TypeError", "exc_message": [keyword], "exc_module": "builtins"}),
        ),
        (
            "add",
            r#"[[1, 2], {}, {"chain": [{"task": "a"}]}]"#,
            json!({"exc_type": "NotImplementedError", "exc_message": [chain], "exc_module": "builtins"}),
        ),
    ] {
        let (stored, outcome) = one(task, body).await;
        let stored = stored.unwrap();
        assert_eq!((&stored["status"], &stored["result"]), (&json!("FAILURE"), &exception));
        let Outcome::Failure { exception: shown, traceback, .. } = outcome else { panic!("{outcome:?}") };
        assert!(shown.starts_with(exception["exc_type"].as_str().unwrap()));
        assert_eq!(stored["traceback"], traceback);
    }
}

#[tokio::test]
async fn an_ignored_result_is_not_stored() {
    let (stored, outcome) = one("quiet", "[[], {}, {}]").await;
    assert!(stored.is_none() && matches!(outcome, Outcome::Failure { .. }));
}

#[tokio::test]
async fn what_cannot_be_read_is_never_accepted() {
    for (body, malformed) in [("[[1", false), ("{}", true)] {
        let mut running = start(app(), 1);
        running.pool.submit(job(1, "add", body)).unwrap();
        let Event::Ended { outcome, .. } = event(&mut running).await else {
            panic!("something else came first")
        };
        assert_eq!(matches!(outcome, Outcome::Malformed { .. }), malformed);
        assert_eq!(matches!(outcome, Outcome::Undecodable { .. }), !malformed);
    }
}

#[tokio::test]
async fn an_interrupted_handler_is_dropped() {
    for (how, expected) in [
        (Interrupt::HardLimit(2.0), "TimedOut { limit: 2.0 }"),
        (Interrupt::Terminate(15), "Terminated"),
        (Interrupt::SoftLimit, "SoftTimeLimitExceeded()"),
    ] {
        let mut running = start(app(), 1);
        running.pool.submit(job(1, "forever", "[[], {}, {}]")).unwrap();
        assert!(matches!(event(&mut running).await, Event::Accepted { .. }));
        running.pool.interrupt(1, how);
        let mut last = event(&mut running).await;
        while let Event::Store { .. } = last {
            last = event(&mut running).await;
        }
        let Event::Ended { outcome, .. } = last else { panic!("{last:?}") };
        assert!(format!("{outcome:?}").contains(expected), "{outcome:?}");
        running.pool.interrupt(1, how);
    }
}

#[tokio::test]
async fn a_job_is_given_back_when_no_slot_is_idle_and_shrinking_waits_for_what_runs() {
    let mut running = start(app(), 2);
    running.pool.submit(job(1, "forever", "[[], {}, {}]")).unwrap();
    running.pool.submit(job(2, "forever", "[[], {}, {}]")).unwrap();
    assert!(running.pool.submit(job(3, "add", "[[1, 2], {}, {}]")).is_err());
    running.pool.shrink(1);
    assert_eq!((running.pool.capacity(), running.pool.idle()), (1, 0));
    running.pool.interrupt(1, Interrupt::Terminate(15));
    running.pool.interrupt(2, Interrupt::Terminate(15));
    let mut down = 0;
    let mut ended = 0;
    while down < 1 || ended < 2 {
        match event(&mut running).await {
            Event::Down { .. } => down += 1,
            Event::Ended { .. } => ended += 1,
            _ => {}
        }
    }
    assert_eq!((running.pool.capacity(), running.pool.idle()), (1, 1));
    running.pool.grow(2);
    assert_eq!((running.pool.capacity(), running.pool.idle()), (3, 3));
}

#[tokio::test(flavor = "current_thread")]
async fn a_stopped_pool_lets_its_jobs_finish_until_the_deadline_and_closes() {
    let mut running = start(app(), 2);
    running.pool.submit(job(1, "add", "[[1, 2], {}, {}]")).unwrap();
    running.pool.submit(job(2, "forever", "[[], {}, {}]")).unwrap();
    running.pool.stop(Instant::now() + Duration::from_millis(200));
    assert!(running.pool.submit(job(3, "add", "[[1, 2], {}, {}]")).is_err());
    let mut outcomes = HashMap::new();
    while let Some(event) = running.events.recv().await {
        if let Event::Ended { job, outcome } = event {
            outcomes.insert(job, outcome);
        }
    }
    assert!(matches!(outcomes[&1], Outcome::Success { .. }));
    assert_eq!(outcomes[&2], Outcome::Terminated);
}
