//! Sessions, connections and workers end at any moment, and no message is lost.

use std::collections::HashSet;
use std::time::Duration;

use celeriac::broker::{Command, Event, Settlement};
use redis::AsyncTypedCommands;
use serde_json::{Value, json};

use super::{Stage, consume};
use crate::broker::client::Client;
use crate::broker::id;
use crate::support::{DEADLINE, wait_until};

/// The ids of all that is in the queue or recorded as unacknowledged, read in one step.
async fn known(stage: &mut Stage) -> HashSet<String> {
    let mut read = redis::pipe();
    read.atomic().lrange("q", 0, -1).hvals("unacked");
    let (waiting, records): (Vec<String>, Vec<String>) = read.query_async(&mut stage.redis).await.unwrap();
    let envelopes = waiting.iter().map(|item| serde_json::from_str::<Value>(item).unwrap());
    let records = records.iter().map(|record| serde_json::from_str::<Value>(record).unwrap()[0].take());
    envelopes.chain(records).map(|envelope| envelope["headers"]["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_message_is_in_its_queue_or_recorded_whenever_a_session_ends() {
    let Some(mut stage) = Stage::start().await else { return };
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let ids: Vec<String> = (0..400).map(|number| format!("task-{number:03}")).collect();
    stage.send("q", &ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let broker = stage.broker(json!({}));
    let mut settled: HashSet<String> = HashSet::new();
    let mut kills = 0;
    while settled.len() < ids.len() {
        let mut session = broker.connect(&consume(&["q"], 0)).await.unwrap();
        let end = Duration::from_micros(random.u64(0..6000));
        let ended = tokio::time::timeout(end, async {
            while let Some(event) = session.events.recv().await {
                let Event::Deliveries(deliveries) = event else { continue };
                for delivery in deliveries {
                    let id = id(&delivery.message);
                    if random.u8(0..10) == 0 {
                        delivery.handle.abandon();
                        continue;
                    }
                    // Told before it is done: what is acknowledged may go at any moment from here on.
                    settled.insert(id);
                    let settlement = vec![delivery.handle.settle(Settlement::Ack)];
                    if session.commands.send(Command::Settle(settlement)).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await;
        if ended.is_err() && random.bool() {
            stage.cut().await;
        }
        while let Ok(event) = session.events.try_recv() {
            if let Event::Deliveries(deliveries) = event {
                for delivery in deliveries {
                    delivery.handle.abandon();
                }
            }
        }
        drop(session);
        kills += 1;
        let known = known(&mut stage).await;
        for id in ids.iter().filter(|id| !settled.contains(*id)) {
            assert!(known.contains(id), "{id} is lost after {kills} sessions");
        }
    }
    // What was acknowledged in a dying session may come once more; then it is done.
    let mut client = Client::connect(&*broker, &consume(&["q"], 0)).await;
    let redis = stage.redis.clone();
    while redis.clone().llen("q").await.unwrap() > 0 || redis.clone().hlen("unacked").await.unwrap() > 0 {
        if client.pending().await > 0 {
            let delivery = client.next().await;
            client.settle([delivery], Settlement::Ack).await;
        }
    }
    client.close().await;
    eprintln!("{kills} sessions");
}

#[tokio::test]
async fn a_cut_connection_ends_the_session_and_the_next_one_has_all() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["a", "b", "c"]).await;
    let broker = stage.broker(json!({}));
    let mut client = Client::connect(&*broker, &consume(&["q"], 2)).await;
    let held = client.take(2).await;
    stage.cut().await;
    let error = client.lost().await;
    assert!(error.is_retryable(), "{error}");

    let mut again = consume(&["q"], 2);
    again.held = held.iter().map(|delivery| delivery.handle.tag()).collect();
    let mut client = Client::connect(&*broker, &again).await;
    client.expect_quiet("both are still held").await;
    client.settle(held, Settlement::Ack).await;
    let third = client.next().await;
    assert_eq!(id(&third.message), "c");
    client.settle([third], Settlement::Ack).await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
    let workers: Vec<String> = stage.redis.zrange("celeriac.workers.unacked", 0, -1).await.unwrap();
    assert!(workers.is_empty(), "{workers:?}");
}

#[tokio::test]
async fn an_acknowledgement_given_to_a_dying_session_is_carried_out_by_the_next() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["done"]).await;
    let broker = stage.broker(json!({}));
    let mut session = broker.connect(&consume(&["q"], 1)).await.unwrap();
    let Some(Event::Deliveries(mut deliveries)) = session.events.recv().await else { panic!("no delivery") };
    let settlement = deliveries.remove(0).handle.settle(Settlement::Ack);
    // The server answers nothing while it is paused; the acknowledgement is on its way when the line is cut.
    redis::cmd("CLIENT").arg("PAUSE").arg(60_000).arg("WRITE").exec_async(&mut stage.redis).await.unwrap();
    session.commands.send(Command::Settle(vec![settlement])).await.unwrap();
    tokio::task::yield_now().await;
    stage.cut().await;
    redis::cmd("CLIENT").arg("UNPAUSE").exec_async(&mut stage.redis).await.unwrap();
    let lost = tokio::time::timeout(DEADLINE, session.events.recv()).await.unwrap();
    assert!(matches!(lost, Some(Event::Lost(_))), "{lost:?}");

    let mut client = Client::connect(&*broker, &consume(&["q"], 1)).await;
    client.expect_quiet("it was acknowledged").await;
    client.close().await;
    assert_eq!(stage.waiting("q").await, 0);
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn what_a_lost_session_took_without_telling_comes_back_at_once_and_in_order() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["a", "b", "c", "d"]).await;
    let broker = stage.broker(json!({}));
    let mut client = Client::connect(&*broker, &consume(&["q"], 3)).await;
    for delivery in client.take(3).await {
        delivery.handle.abandon();
    }
    client.vanish();
    assert_eq!(stage.waiting("q").await, 1);
    let mut client = Client::connect(&*broker, &consume(&["q"], 0)).await;
    let deliveries = client.take(4).await;
    let ids: Vec<String> = deliveries.iter().map(|delivery| id(&delivery.message)).collect();
    assert_eq!(ids, ["a", "b", "c", "d"]);
    client.settle(deliveries, Settlement::Ack).await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn a_session_that_was_declared_dead_takes_nothing_more_and_ends() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["a"]).await;
    let broker = stage.broker(json!({}));
    let mut client = Client::connect(&*broker, &consume(&["q"], 2)).await;
    let held = client.next().await;
    let workers: Vec<String> = stage.redis.zrange("celeriac.workers.unacked", 0, -1).await.unwrap();
    let (owner, _) = (workers[0].clone(), assert_eq!(workers.len(), 1));
    // Another worker found it silent, and put back what it held.
    let (field, _) = stage.unacked().await.remove(0);
    let mut bury = redis::pipe();
    bury.atomic()
        .zrem("celeriac.workers.unacked", owner)
        .hdel("unacked", &field)
        .zrem("unacked_index", &field);
    bury.exec_async(&mut stage.redis).await.unwrap();
    stage.send("q", &["b"]).await;
    let error = client.lost().await;
    assert!(error.is_retryable(), "{error}");
    assert_eq!(stage.waiting("q").await, 1, "it took nothing after it was declared dead");

    let mut again = consume(&["q"], 2);
    again.held = [held.handle.tag()].into_iter().collect();
    let tag = held.handle.abandon();
    let mut client = Client::connect(&*broker, &again).await;
    client.forgets(tag).await;
    let next = client.next().await;
    assert_eq!(id(&next.message), "b");
    client.settle([next], Settlement::Ack).await;
    client.close().await;
}

#[tokio::test]
async fn an_index_entry_without_a_record_and_a_record_without_sense_are_tidied_away() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.redis.zadd("unacked_index", "no record", 5.0).await.unwrap();
    stage.redis.zadd("unacked_index", "no sense", 6.0).await.unwrap();
    stage.redis.hset("unacked", "no sense", "[1, 2").await.unwrap();
    let client = Client::connect(&*stage.broker(json!({})), &consume(&["q"], 1)).await;
    let redis = &stage.redis;
    wait_until("both are gone", async || redis.clone().zcard("unacked_index").await.unwrap() == 0).await;
    assert_eq!(stage.redis.hlen("unacked").await.unwrap(), 0);
    client.close().await;
}

#[tokio::test]
async fn a_parked_message_whose_return_was_lost_with_the_connection_goes_back_to_its_queue() {
    let Some(mut stage) = Stage::start().await else { return };
    stage.send("q", &["later"]).await;
    let broker = stage.broker(json!({}));
    let mut client = Client::connect(&*broker, &consume(&["q"], 1)).await;
    let tag = client.next().await.handle.abandon();
    client.tell(Command::Park { tag, due: 4e9 }).await;
    client.send("elsewhere", crate::broker::message("after")).await;
    // Whether the script ran before the line was cut nobody knows.
    redis::cmd("CLIENT").arg("PAUSE").arg(60_000).arg("WRITE").exec_async(&mut stage.redis).await.unwrap();
    client.tell(Command::Unpark(vec![tag])).await;
    stage.cut().await;
    redis::cmd("CLIENT").arg("UNPAUSE").exec_async(&mut stage.redis).await.unwrap();
    client.lost().await;

    let mut again = consume(&["q"], 1);
    again.held = [tag].into_iter().collect();
    let mut client = Client::connect(&*broker, &again).await;
    client.forgets(tag).await;
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "later");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
}

#[tokio::test]
async fn messages_larger_than_what_a_subscriber_may_receive_are_taken() {
    let Some(mut stage) = Stage::start().await else { return };
    let limit = ["CONFIG", "SET", "client-output-buffer-limit", "pubsub 1mb 1mb 1"];
    redis::cmd(limit[0]).arg(&limit[1..]).exec_async(&mut stage.redis).await.unwrap();
    let large = "x".repeat(3 << 20);
    for number in 0..4 {
        let mut item = crate::broker::envelope("q", &crate::broker::message(&number.to_string()));
        item["headers"]["large"] = json!(large);
        stage.redis.lpush("q", item.to_string()).await.unwrap();
    }
    let mut consume = consume(&["q"], 4);
    consume.control = Some(super::control());
    let mut client = Client::connect(&*stage.broker(json!({})), &consume).await;
    let deliveries = client.take(4).await;
    client.settle(deliveries, Settlement::GiveBack).await;
    let deliveries = client.take(4).await;
    let ids: Vec<String> = deliveries.iter().map(|delivery| id(&delivery.message)).collect();
    assert_eq!(ids, ["0", "1", "2", "3"]);
    client.settle(deliveries, Settlement::Ack).await;
    client.close().await;
    assert!(stage.unacked().await.is_empty());
}
