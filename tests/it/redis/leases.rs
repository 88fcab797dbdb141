//! What is held is renewed, fenced, and parked.

use celeriac::broker::{Command, Settlement};
use redis::AsyncTypedCommands;
use serde_json::json;

use super::{Stage, consume};
use crate::broker::client::Client;
use crate::broker::id;
use crate::support::wait_until;

async fn server_time(stage: &mut Stage) -> f64 {
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query_async(&mut stage.redis).await.unwrap();
    seconds as f64 + micros as f64 / 1e6
}

#[tokio::test]
async fn a_held_message_is_renewed_and_no_sweep_takes_it() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["long"]).await;
    let options = json!({"visibility_timeout": 1.5});
    let mut holder = Client::connect(&*stage.broker(options.clone()), &consume(&["q"], 1)).await;
    let held = holder.next().await;
    let mut sweeper = Client::connect(&*stage.broker(options), &consume(&["q"], 1)).await;
    let first = stage.unacked().await[0].1;
    // Three timeouts later, had nobody renewed it.
    let redis = &stage.redis;
    wait_until("the lease is renewed", async || {
        let scores = redis.clone().zrange_withscores("unacked_index", 0, -1).await.unwrap();
        scores.first().is_some_and(|(_, score)| *score > first + 4.5)
    })
    .await;
    sweeper.expect_quiet("the message is held").await;
    holder.settle([held], Settlement::Ack).await;
    holder.close().await;
    sweeper.close().await;
    assert!(stage.unacked().await.is_empty());
    assert_eq!(stage.waiting("q").await, 0);
}

#[tokio::test]
async fn an_acknowledgement_that_comes_too_late_leaves_the_next_holder_alone() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["one"]).await;
    let mut slow = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    let late = slow.next().await;
    // A sweep of somebody's took it for overdue.
    let (field, _) = stage.unacked().await.remove(0);
    let record: String = stage.redis.hget("unacked", &field).await.unwrap().unwrap();
    let mut other = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    let item = record.strip_prefix('[').and_then(|rest| rest.strip_suffix(r#","","q"]"#)).unwrap();
    let mut restore = redis::pipe();
    restore.atomic().zrem("unacked_index", &field).hdel("unacked", &field).rpush("q", item);
    restore.exec_async(&mut stage.redis).await.unwrap();
    // Whoever takes it now has a field of his own; the slow one has no room.
    let taken = other.next().await;
    slow.settle([late], Settlement::Ack).await;
    slow.send("elsewhere", crate::broker::message("after")).await;
    assert_eq!(stage.unacked().await.len(), 1, "the second holder's record is there");
    other.settle([taken], Settlement::Ack).await;
    other.close().await;
    slow.close().await;
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn a_lease_that_was_lost_is_reported() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["one"]).await;
    let mut client =
        Client::connect(&*stage.broker(json!({"visibility_timeout": 3})), &consume(&["q"], 1)).await;
    let held = client.next().await;
    let tag = held.handle.abandon();
    let (field, _) = stage.unacked().await.remove(0);
    let mut steal = redis::pipe();
    steal.atomic().zrem("unacked_index", &field).hdel("unacked", &field);
    steal.exec_async(&mut stage.redis).await.unwrap();
    client.forgets(tag).await;
    client.close().await;
}

#[tokio::test]
async fn a_parked_message_has_the_score_at_which_anybody_restores_it_at_its_time() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["later"]).await;
    let mut client =
        Client::connect(&*stage.broker(json!({"visibility_timeout": 100})), &consume(&["q"], 1)).await;
    let delivery = client.next().await;
    let due = server_time(&mut stage).await.floor() + 3000.0;
    let tag = delivery.handle.abandon();
    client.tell(Command::Park { tag, due }).await;
    client.send("elsewhere", crate::broker::message("after")).await;
    let parked = stage.unacked().await;
    assert_eq!(parked.len(), 1);
    assert!((parked[0].1 - (due - 100.0)).abs() < 1e-6, "{parked:?}");
    client.close().await;
    assert_eq!(stage.unacked().await, parked, "it stays parked when its worker goes");
}

#[tokio::test]
async fn a_parked_message_of_a_dead_worker_runs_when_it_is_due_and_not_before() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["later"]).await;
    let dead = stage.broker(json!({}));
    let mut client = Client::connect(&*dead, &consume(&["q"], 1)).await;
    let delivery = client.next().await;
    let due = server_time(&mut stage).await + 10.0;
    let tag = delivery.handle.abandon();
    client.tell(Command::Park { tag, due }).await;
    client.send("elsewhere", crate::broker::message("after")).await;
    client.vanish();
    drop(dead);

    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    let delivery = client.next().await;
    assert!(server_time(&mut stage).await >= due, "it came before its time");
    assert_eq!(id(&delivery.message), "later");
    assert!(delivery.info.redelivered);
    client.settle([delivery], Settlement::Ack).await;
    client.expect_quiet("it runs once").await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn a_parked_message_can_be_settled_and_fetched_after_a_reconnect() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["revoked", "later"]).await;
    let broker = stage.broker(json!({}));
    let mut client = Client::connect(&*broker, &consume(&["q"], 1)).await;
    let due = server_time(&mut stage).await + 3000.0;
    let revoked = client.next().await;
    client.tell(Command::Park { tag: revoked.handle.tag(), due }).await;
    let later = client.next().await.handle.abandon();
    client.tell(Command::Park { tag: later, due }).await;
    client.send("elsewhere", crate::broker::message("after")).await;
    client.vanish();

    let mut again = consume(&["q"], 1);
    again.held = [revoked.handle.tag(), later].into_iter().collect();
    let mut client = Client::connect(&*broker, &again).await;
    client.settle([revoked], Settlement::Ack).await;
    client.tell(Command::Unpark(vec![later])).await;
    let delivery = client.next().await;
    assert_eq!((id(&delivery.message).as_str(), delivery.handle.tag()), ("later", later));
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn a_parked_message_that_somebody_took_is_forgotten() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["later"]).await;
    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    let tag = client.next().await.handle.abandon();
    let due = server_time(&mut stage).await + 3000.0;
    client.tell(Command::Park { tag, due }).await;
    client.send("elsewhere", crate::broker::message("after")).await;
    stage.redis.del("unacked").await.unwrap();
    stage.redis.del("unacked_index").await.unwrap();
    client.tell(Command::Unpark(vec![tag])).await;
    client.forgets(tag).await;
    client.close().await;
}
