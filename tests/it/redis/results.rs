//! The result backend, and Celery reading what it wrote.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use celeriac::backend::redis::RedisBackend;
use celeriac::backend::{BackendConfig, Counted, Part, Record, ResultBackend};
use redis::AsyncTypedCommands;
use serde_json::json;

use super::MODULES;
use super::Stage;
use crate::support::python::python;
use crate::support::wait_until;

fn backend(stage: &Stage) -> Arc<dyn ResultBackend> {
    let config = BackendConfig { url: stage.server.url(), native: true, ..BackendConfig::default() };
    Arc::new(RedisBackend::new(&config).unwrap().unwrap())
}

fn record(id: &str, state: &str, expires: Option<u64>) -> Record {
    let document = json!({
        "status": state, "result": [1, 2], "traceback": null, "children": [],
        "date_done": "2026-11-22T10:00:00+00:00", "task_id": id,
    });
    Record {
        task_id: id.to_owned(),
        state: state.to_owned(),
        document: document.to_string().into(),
        key: String::new(),
        expires: expires.map(Duration::from_secs),
        content_type: "application/json".to_owned(),
        content_encoding: "utf-8".to_owned(),
    }
}

#[tokio::test]
async fn results_are_stored_with_their_time_to_live_and_celery_reads_them() {
    let Some(mut stage) = Stage::start().await else { return };
    let backend = backend(&stage);
    let records = [record("a", "SUCCESS", Some(100)), record("b", "STARTED", None)];
    assert!(backend.store(&records).await.iter().all(Result::is_ok));
    let left: Vec<i64> = redis::pipe()
        .ttl("celery-task-meta-a")
        .ttl("celery-task-meta-b")
        .query_async(&mut stage.redis)
        .await
        .unwrap();
    assert!((90..=100).contains(&left[0]) && left[1] == -1, "{left:?}");
    assert_eq!(backend.get("a").await.unwrap().unwrap(), records[0].document);
    assert_eq!(backend.get("nobody").await.unwrap(), None);
    let Some(python) = python(MODULES) else { return };
    let reader = "import sys; from celery import Celery\n\
                  app = Celery(backend=sys.argv[1])\n\
                  print(app.AsyncResult('a').get(), app.AsyncResult('b').state)";
    assert_eq!(python.run(&["-c", reader, &stage.server.url()]).trim(), "[1, 2] STARTED");
}

#[tokio::test]
async fn a_stored_success_is_never_overwritten_whatever_it_was_serialized_with() {
    let Some(mut stage) = Stage::start().await else { return };
    let backend = backend(&stage);
    let success = record("a", "SUCCESS", None);
    backend.store(&[success.clone(), record("a", "FAILURE", None)]).await;
    assert!(backend.store(&[record("a", "RETRY", None)]).await[0].is_ok());
    assert_eq!(backend.get("a").await.unwrap().unwrap(), success.document);
    let key = "celery-task-meta-a";
    let others: [&[u8]; 4] = [
        br#"{"result": "\"status\": \"x\"", "status":"SUCCESS"}"#,
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x06status\x94\x8c\x07SUCCESS\x94\x8c\x06result\x94K\x01u.",
        b"status: SUCCESS\nresult: 1\n",
        b"\x82\xa6status\xa7SUCCESS\xa6result\x01",
    ];
    for stored in others {
        stage.redis.set(key, stored).await.unwrap();
        backend.store(&[record("a", "FAILURE", None)]).await;
        assert_eq!(backend.get("a").await.unwrap().unwrap(), stored, "{}", String::from_utf8_lossy(stored));
    }
    for stored in [r#"{"status": "FAILURE", "result": "SUCCESS"}"#, "garbage", "", r#"["SUCCESS"]"#] {
        stage.redis.set(key, stored).await.unwrap();
        backend.store(&[record("a", "REVOKED", None)]).await;
        assert_eq!(
            backend.get("a").await.unwrap().unwrap(),
            record("a", "REVOKED", None).document,
            "{stored}"
        );
    }
}

#[tokio::test]
async fn who_waits_for_a_result_is_told() {
    let Some(stage) = Stage::start().await else { return };
    let Some(python) = python(MODULES) else { return };
    let backend = backend(&stage);
    let url = stage.server.url();
    let waiter = "import sys; from celery import Celery\n\
                  app = Celery(backend=sys.argv[1])\n\
                  print(app.AsyncResult('a').get(timeout=30))";
    let waiting = tokio::task::spawn_blocking(move || python.run(&["-c", waiter, &url]));
    let redis = &stage.redis;
    wait_until("the client subscribes", async || {
        let channels: Vec<String> =
            redis::cmd("PUBSUB").arg("CHANNELS").query_async(&mut redis.clone()).await.unwrap();
        !channels.is_empty()
    })
    .await;
    backend.store(&[record("a", "SUCCESS", None)]).await;
    assert_eq!(waiting.await.unwrap().trim(), "[1, 2]");
}

#[tokio::test]
async fn many_results_are_stored_in_order_and_one_that_is_refused_spoils_no_other() {
    let Some(mut stage) = Stage::start().await else { return };
    let backend = backend(&stage);
    stage.redis.lpush("celery-task-meta-7", "a list").await.unwrap();
    let records: Vec<Record> = (0..300).map(|number| record(&number.to_string(), "SUCCESS", None)).collect();
    let answers = backend.store(&records).await;
    assert_eq!(answers.len(), 300);
    for (number, answer) in answers.iter().enumerate() {
        match answer {
            Ok(()) => assert_ne!(number, 7),
            Err(error) => assert!(number == 7 && !error.is_retryable(), "{number}: {error}"),
        }
    }
    assert!(backend.get("299").await.unwrap().is_some());
}

#[tokio::test]
async fn a_cut_connection_is_replaced_and_an_unreachable_server_is_worth_another_try() {
    let Some(mut stage) = Stage::start().await else { return };
    let backend = backend(&stage);
    assert!(backend.store(&[record("a", "SUCCESS", None)]).await[0].is_ok());
    stage.cut().await;
    redis::cmd("SCRIPT").arg("FLUSH").exec_async(&mut stage.redis).await.unwrap();
    assert!(backend.store(&[record("b", "SUCCESS", None)]).await[0].is_ok());
    redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).exec_async(&mut stage.redis).await.unwrap();
    let full = backend.store(&[record("c", "SUCCESS", None)]).await.remove(0).unwrap_err();
    assert!(full.is_retryable(), "{full}");
    stage.server.kill();
    let answers = backend.store(&[record("d", "SUCCESS", None), record("e", "SUCCESS", None)]).await;
    assert!(answers.iter().all(|answer| answer.as_ref().is_err_and(|error| error.is_retryable())));
}

/// Counts a member of the chord `g`, as `token`.
async fn count(backend: &dyn ResultBackend, id: &str, index: u32, token: &str) -> Counted {
    count_again(backend, id, index, token, false).await
}

/// The same; `again`: for a message that was delivered before.
async fn count_again(backend: &dyn ResultBackend, id: &str, index: u32, token: &str, again: bool) -> Counted {
    let keys = [".j", ".t", ".s", ".d", "", ".c", ".o"];
    let again = if again { "1" } else { "0" };
    let arguments = [id, &format!("result of {id}"), "1", &index.to_string(), "60", "60", "60", token, again];
    let part = Part {
        keys: keys.iter().map(|suffix| Bytes::from(format!("g{suffix}"))).collect(),
        arguments: arguments.iter().map(|text| Bytes::from((*text).to_owned())).collect(),
    };
    backend.count(&[part]).await.remove(0).unwrap()
}

#[tokio::test]
async fn a_member_of_a_chord_counts_once_and_one_sender_at_a_time_is_told_to_send_the_body() {
    let Some(mut stage) = Stage::start().await else { return };
    let backend = backend(&stage);
    let answer = |ready, size, sends| Counted { ready, added: None, size, sends };
    assert_eq!(count(&*backend, "a", 0, "1").await, answer(1, None, false), "nobody knows of the chord yet");
    stage.redis.set("g.s", 2).await.unwrap();
    assert_eq!(count(&*backend, "a", 0, "2").await, answer(1, Some(2), false));
    assert_eq!(count(&*backend, "b", 1, "3").await, answer(2, Some(2), true));
    // Another member comes again: the sender of the body has its time. The same one: its worker died.
    assert_eq!(count(&*backend, "a", 0, "4").await, answer(2, Some(2), false));
    assert_eq!(count(&*backend, "b", 1, "5").await, answer(2, Some(2), true));
    assert_eq!(stage.redis.get("g.c").await.unwrap().as_deref(), Some("5"));
    assert_eq!(stage.redis.zrange("g.j", 0, -1).await.unwrap(), ["result of a", "result of b"]);
    for key in ["g.j", "g.s", "g.d", "g.c", "g.o"] {
        let left: i64 = redis::cmd("TTL").arg(key).query_async(&mut stage.redis).await.unwrap();
        assert!((1..=60).contains(&left), "{key}: {left}");
    }
    stage.redis.set("g.c", "done").await.unwrap();
    assert_eq!(count_again(&*backend, "b", 1, "6", true).await.ready, -1, "a copy of a chord that is done");
    // As Celery cleans up; a frozen chord is sent again under its old ids.
    redis::cmd("DEL").arg(&["g.j", "g.d"]).exec_async(&mut stage.redis).await.unwrap();
    assert_eq!(count(&*backend, "b", 1, "7").await, answer(1, Some(2), false));
    assert_eq!(count(&*backend, "a", 0, "8").await, answer(2, Some(2), true));
}
