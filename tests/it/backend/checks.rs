//! What every result backend promises, one function a promise.

use std::time::Duration;

use celeriac::backend::{Record, ResultBackend};

use super::{Harness, record};
use crate::support::wait_until;

/// Makes every check a test of its own for one backend: `run!(on_redis: redis::RedisHarness);`
macro_rules! run {
    ($module:ident: $harness:ty) => {
        $crate::backend::checks::run! { @ $module, $harness,
            what_is_stored_can_be_read,
            an_unknown_task_has_no_result,
            each_state_takes_the_place_of_the_one_before,
            the_first_success_wins,
            records_of_a_batch_are_written_in_their_order_and_each_is_answered,
            a_document_of_any_serializer_is_kept_byte_for_byte,
            a_success_is_recognised_in_any_serializer,
            a_key_given_with_the_record_is_used,
            a_result_expires_in_its_time,
            an_id_that_no_key_can_hold_harms_nobody,
            a_store_that_is_gone_is_an_error_that_is_tried_again,
        }
    };
    (@ $module:ident, $harness:ty, $($check:ident),* $(,)?) => {
        mod $module {
            use super::*;

            $(
                #[tokio::test]
                async fn $check() {
                    let Some(harness) = <$harness as Harness>::start().await else { return };
                    checks::$check(harness).await;
                }
            )*
        }
    };
}
pub(crate) use run;

async fn store(backend: &dyn ResultBackend, records: &[Record]) {
    let answers = backend.store(records).await;
    assert_eq!(answers.len(), records.len());
    for answer in answers {
        answer.unwrap();
    }
}

async fn reads(backend: &dyn ResultBackend, expected: &Record) {
    let document = backend.get(&expected.task_id).await.unwrap();
    assert_eq!(document.as_ref(), Some(&expected.document));
}

pub(crate) async fn what_is_stored_can_be_read<H: Harness>(harness: H) {
    let success = record("one", "SUCCESS", "10");
    store(&*harness.backend(), std::slice::from_ref(&success)).await;
    // By another worker, too.
    reads(&*harness.backend(), &success).await;
}

pub(crate) async fn an_unknown_task_has_no_result<H: Harness>(harness: H) {
    assert_eq!(harness.backend().get("unknown").await.unwrap(), None);
}

pub(crate) async fn each_state_takes_the_place_of_the_one_before<H: Harness>(harness: H) {
    let backend = harness.backend();
    for state in ["STARTED", "RETRY", "STARTED", "PROGRESS", "FAILURE", "SUCCESS"] {
        let record = record("one", state, state);
        store(&*backend, std::slice::from_ref(&record)).await;
        reads(&*backend, &record).await;
    }
}

pub(crate) async fn the_first_success_wins<H: Harness>(harness: H) {
    let backend = harness.backend();
    let success = record("one", "SUCCESS", "first");
    store(&*backend, std::slice::from_ref(&success)).await;
    for state in ["STARTED", "FAILURE", "SUCCESS", "REVOKED"] {
        store(&*backend, &[record("one", state, "later")]).await;
        reads(&*backend, &success).await;
    }
}

pub(crate) async fn records_of_a_batch_are_written_in_their_order_and_each_is_answered<H: Harness>(
    harness: H,
) {
    let backend = harness.backend();
    let mut batch = Vec::new();
    for task in 0..40 {
        batch.push(record(&format!("task-{task}"), "STARTED", "0"));
    }
    for task in 0..40 {
        batch.push(record(&format!("task-{task}"), if task % 2 == 0 { "SUCCESS" } else { "FAILURE" }, "1"));
        batch.push(record(&format!("task-{task}"), "RETRY", "2"));
    }
    store(&*backend, &batch).await;
    for task in 0..40 {
        let expected = if task % 2 == 0 { ("SUCCESS", "1") } else { ("RETRY", "2") };
        reads(&*backend, &record(&format!("task-{task}"), expected.0, expected.1)).await;
    }
    assert!(backend.store(&[]).await.is_empty());
}

pub(crate) async fn a_document_of_any_serializer_is_kept_byte_for_byte<H: Harness>(harness: H) {
    let backend = harness.backend();
    let mut record = record("one", "FAILURE", "");
    record.content_type = "application/x-python-serialize".to_owned();
    record.content_encoding = "binary".to_owned();
    record.document = bytes::Bytes::from((0..=255_u8).cycle().take(300_000).collect::<Vec<_>>());
    store(&*backend, std::slice::from_ref(&record)).await;
    reads(&*backend, &record).await;
}

pub(crate) async fn a_success_is_recognised_in_any_serializer<H: Harness>(harness: H) {
    let backend = harness.backend();
    let documents: [&[u8]; 3] = [
        b"\x80\x04\x95G\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x06status\x94\x8c\x07SUCCESS\x94\x8c\x06result\x94K\x03u.",
        b"\x82\xa6status\xa7SUCCESS\xa6result\x03",
        b"result: 3\nstatus: SUCCESS\n",
    ];
    for (number, document) in documents.into_iter().enumerate() {
        let mut success = record(&format!("task-{number}"), "SUCCESS", "");
        success.document = bytes::Bytes::from_static(document);
        store(&*backend, &[success.clone(), record(&success.task_id, "FAILURE", "")]).await;
        reads(&*backend, &success).await;
    }
}

pub(crate) async fn a_key_given_with_the_record_is_used<H: Harness>(harness: H) {
    let backend = harness.backend();
    let mut record = record("elsewhere", "SUCCESS", "10");
    record.key = "celery-task-meta-one".to_owned();
    store(&*backend, std::slice::from_ref(&record)).await;
    assert_eq!(backend.get("one").await.unwrap(), Some(record.document));
    assert_eq!(backend.get("elsewhere").await.unwrap(), None);
}

pub(crate) async fn a_result_expires_in_its_time<H: Harness>(harness: H) {
    if !harness.expires() {
        return;
    }
    let backend = harness.backend();
    let (mut brief, mut kept) = (record("brief", "SUCCESS", ""), record("kept", "SUCCESS", ""));
    brief.expires = Some(Duration::from_secs(1));
    kept.expires = None;
    store(&*backend, &[brief, kept.clone()]).await;
    wait_until("the result expires", async || backend.get("brief").await.unwrap().is_none()).await;
    reads(&*backend, &kept).await;
}

pub(crate) async fn an_id_that_no_key_can_hold_harms_nobody<H: Harness>(harness: H) {
    let backend = harness.backend();
    let good = record("good", "SUCCESS", "");
    for id in ["../../escaped", "a/b", "nul\0byte", "\u{1f600} and spaces", ""] {
        // Stored or refused, but the others of the batch are none the worse.
        let answers = backend.store(&[record(id, "SUCCESS", ""), good.clone()]).await;
        assert!(answers[0].as_ref().err().is_none_or(|error| !error.is_retryable()), "{id}");
        assert!(answers[1].is_ok(), "{id}");
        reads(&*backend, &good).await;
    }
}

pub(crate) async fn a_store_that_is_gone_is_an_error_that_is_tried_again<H: Harness>(mut harness: H) {
    let backend = harness.backend();
    store(&*backend, &[record("one", "SUCCESS", "")]).await;
    if !harness.kill() {
        return;
    }
    let answers = backend.store(&[record("two", "SUCCESS", ""), record("three", "SUCCESS", "")]).await;
    assert_eq!(answers.len(), 2);
    for answer in answers {
        assert!(answer.unwrap_err().is_retryable());
    }
}
