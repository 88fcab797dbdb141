//! What workers to come are told of: one key, bounded in number and time, and never a reason not to start.

use celeriac::broker::{Command, Remembrance};
use redis::AsyncTypedCommands;
use serde_json::json;

use super::{Stage, consume};
use crate::broker::client::Client;
use crate::broker::message;

fn remember(entries: &[(&str, f64)], most: usize) -> Command {
    let entries = entries.iter().map(|(text, keep)| ((*text).to_owned(), *keep)).collect();
    Command::Remember(Remembrance { entries, most })
}

#[tokio::test]
async fn the_key_lies_under_the_prefix_and_goes_with_the_last_entry() {
    let Some(mut stage) = Stage::start().await else { return };
    let client = Client::connect(&*stage.broker(json!({"global_keyprefix": "app_"})), &consume(&[], 1)).await;
    client.tell(remember(&[("a", 90.0), ("b", 30.0)], 0)).await;
    client.send("q", message("1")).await;
    let key = "app_celeriac.revoked";
    assert_eq!(stage.redis.zrange(key, 0, -1).await.unwrap(), ["b", "a"]);
    let seconds = |ttl| if let redis::IntegerReplyOrNoOp::IntegerReply(seconds) = ttl { seconds } else { 0 };
    let ttl = seconds(stage.redis.ttl(key).await.unwrap());
    assert!((60..=92).contains(&ttl), "{ttl}");
    client.tell(remember(&[("c", f64::INFINITY)], 2)).await;
    client.send("q", message("2")).await;
    assert_eq!(stage.redis.zrange(key, 0, -1).await.unwrap(), ["a", "c"]);
    assert_eq!(seconds(stage.redis.ttl(key).await.unwrap()), 0, "it has no end");
    client.close().await;
}

#[tokio::test]
async fn what_has_ended_is_not_remembered_and_is_cleared_with_the_next() {
    let Some(mut stage) = Stage::start().await else { return };
    let key = "celeriac.revoked";
    stage.redis.zadd(key, "old", 1).await.unwrap();
    stage.redis.zadd(key, "new", 4_000_000_000_u64).await.unwrap();
    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&[], 1)).await;
    assert_eq!(client.remembered().await, ["new"]);
    client.tell(remember(&[("newer", 5_000_000_000.0)], 0)).await;
    client.send("q", message("1")).await;
    assert_eq!(stage.redis.zrange(key, 0, -1).await.unwrap(), ["new", "newer"]);
    client.close().await;
}

#[tokio::test]
async fn whatever_a_lost_session_was_told_is_remembered_by_it_or_by_the_next() {
    let Some(mut stage) = Stage::start().await else { return };
    let broker = stage.broker(json!({}));
    let client = Client::connect(&*broker, &consume(&[], 1)).await;
    let mut told = Vec::new();
    for number in 100..300 {
        if number == 150 {
            stage.cut().await;
        }
        let text = number.to_string();
        // Once the session has ended the worker keeps the command for the next itself.
        if client.try_tell(remember(&[(&text, 60.0)], 0)).await {
            told.push(text);
        }
    }
    assert!(told.len() >= 50, "{told:?}");
    client.lost().await;
    let next = Client::connect(&*broker, &consume(&[], 1)).await;
    next.send("q", message("1")).await;
    let mut kept = stage.redis.zrange("celeriac.revoked", 0, -1).await.unwrap();
    kept.sort_unstable();
    assert_eq!(kept, told);
    next.close().await;
}

#[tokio::test]
async fn a_server_that_keeps_us_from_the_key_costs_no_message() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.redis.set("celeriac.revoked", "something else").await.unwrap();
    stage.send("q", &["1"]).await;
    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    client.tell(remember(&[("a", 60.0)], 0)).await;
    let delivery = client.next().await;
    client.send("other", message("2")).await;
    assert_eq!(stage.waiting("other").await, 1);
    delivery.handle.abandon();
    client.close().await;
}
