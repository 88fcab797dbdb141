//! Odd servers and odd keys.

use celeriac::broker::Settlement;
use redis::AsyncTypedCommands;
use serde_json::json;

use super::{Stage, conformance, consume};
use crate::broker::client::Client;
use crate::broker::{envelope, id, message};
use crate::support::redis::RedisServer;
use crate::support::wait_until;

/// How often scripts ran.
async fn scripts(stage: &Stage) -> u64 {
    let stats: String =
        redis::cmd("INFO").arg("commandstats").query_async(&mut stage.redis.clone()).await.unwrap();
    let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")?.split(',').next());
    calls.map_or(0, |calls| calls.parse().unwrap())
}

async fn last_beat(stage: &Stage) -> f64 {
    let beats = stage.redis.clone().zrange_withscores("celeriac.workers.unacked", 0, -1).await.unwrap();
    beats[0].1
}

#[tokio::test]
async fn an_idle_session_does_nothing_but_beat() {
    let Some(stage) = Stage::start().await else { return };
    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&["q", "r"], 4)).await;
    client.expect_quiet("there is nothing").await;
    let (before, mut beat, mut beats) = (scripts(&stage).await, last_beat(&stage).await, 0);
    while beats < 3 {
        let now = last_beat(&stage).await;
        if now > beat {
            (beat, beats) = (now, beats + 1);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let ran = scripts(&stage).await - before;
    assert!(ran <= beats + 1, "{ran} scripts in {beats} beats");
    client.close().await;
}

#[tokio::test]
async fn a_worker_has_two_connections_and_without_remote_control_one() {
    let Some(stage) = Stage::start().await else { return };
    let mut consume = consume(&["q"], 4);
    for (control, expected) in [(None, 1), (Some(super::control()), 2)] {
        consume.control = control;
        let client = Client::connect(&*stage.broker(json!({"client_name": "mine"})), &consume).await;
        let clients: String =
            redis::cmd("CLIENT").arg("LIST").query_async(&mut stage.redis.clone()).await.unwrap();
        assert_eq!(clients.matches("name=mine").count(), expected, "{clients}");
        assert_eq!(clients.lines().count(), expected + 1, "{clients}");
        client.close().await;
        let redis = &stage.redis;
        wait_until("its connections are closed", async || {
            let clients: String =
                redis::cmd("CLIENT").arg("LIST").query_async(&mut redis.clone()).await.unwrap();
            clients.lines().count() == 1
        })
        .await;
    }
}

#[tokio::test]
async fn a_server_that_cannot_tell_of_changes_is_polled() {
    let Some(server) = RedisServer::with(&["--rename-command", "CLIENT", "NOCLIENT"]) else { return };
    let mut redis = conformance::connection(&server.url()).await;
    let mut client =
        Client::connect(&*conformance::broker(&server.url(), json!({})), &consume(&["q"], 4)).await;
    client.expect_quiet("there is nothing").await;
    redis.lpush("q", envelope("q", &message("a")).to_string()).await.unwrap();
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "a");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert_eq!(redis.hlen("unacked").await.unwrap(), 0);
}

#[tokio::test]
async fn a_full_server_is_drained() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["a", "b", "c"]).await;
    let mut client =
        Client::connect(&*stage.broker(json!({"visibility_timeout": 3})), &consume(&["q"], 1)).await;
    let first = client.next().await;
    redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).exec_async(&mut stage.redis).await.unwrap();
    let beat = last_beat(&stage).await;
    client.settle([first], Settlement::Ack).await;
    for expected in ["b", "c"] {
        let delivery = client.next().await;
        assert_eq!(id(&delivery.message), expected);
        if expected == "b" {
            client.settle([delivery], Settlement::Ack).await;
        } else {
            client.settle([delivery], Settlement::GiveBack).await;
        }
    }
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "c");
    wait_until("it still shows signs of life", async || last_beat(&stage).await > beat).await;
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert_eq!(stage.waiting("q").await, 0);
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn a_queue_whose_key_is_no_list_holds_up_nobody() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.redis.set("bad", "not a list").await.unwrap();
    let mut client = Client::connect(&*stage.broker(json!({})), &consume(&["bad", "good"], 4)).await;
    client.expect_quiet("there is nothing").await;
    stage.send("good", &["a"]).await;
    let delivery = client.next().await;
    assert_eq!((id(&delivery.message).as_str(), delivery.info.queue.as_str()), ("a", "good"));
    client.settle([delivery], Settlement::Ack).await;
    stage.redis.del("bad").await.unwrap();
    stage.send("bad", &["b"]).await;
    let delivery = client.next().await;
    assert_eq!(delivery.info.queue, "bad");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}

#[tokio::test]
async fn a_wrong_type_of_unacked_costs_no_message() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.redis.set("unacked", "not a hash").await.unwrap();
    stage.send("q", &["a", "b"]).await;
    let client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 4)).await;
    client.lost().await;
    assert_eq!(stage.waiting("q").await, 2);
}

#[tokio::test]
async fn a_wrong_password_is_final_and_the_right_one_works() {
    let Some(server) = RedisServer::with(&["--requirepass", "right"]) else { return };
    let url = |password: &str| server.url().replace("redis://", &format!("redis://:{password}@"));
    let wrong = conformance::broker(&url("wrong"), json!({}));
    let Err(error) = wrong.connect(&consume(&["q"], 1)).await else {
        panic!("a wrong password was accepted")
    };
    assert!(!error.is_retryable(), "{error}");
    assert!(!error.to_string().contains("wrong@"), "the password is shown: {error}");
    let client = Client::connect(&*conformance::broker(&url("right"), json!({})), &consume(&["q"], 1)).await;
    client.close().await;
}
