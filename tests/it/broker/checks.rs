//! What every broker promises, one function a promise.

use std::collections::{BTreeSet, HashMap, HashSet};

use celeriac::broker::topology::{Binding, Exchange, Queue};
use celeriac::broker::{Command, Delivery, Publication, Remembrance, Settlement};

use super::client::Client;
use super::{Harness, id, message};
use crate::support::wait_until;

/// Makes every check a test of its own for one broker: `run!(on_redis: redis::RedisHarness);`
macro_rules! run {
    ($module:ident: $harness:ty) => {
        $crate::broker::checks::run! { @ $module, $harness,
            an_acknowledged_message_is_gone,
            messages_come_in_the_order_in_which_they_were_sent,
            what_a_vanished_session_held_comes_back,
            what_a_dead_worker_held_comes_back_to_another,
            each_message_is_settled_exactly_once_in_whatever_order,
            a_rejected_message_is_dropped,
            a_requeued_message_comes_back_marked_redelivered,
            what_is_given_back_comes_first_and_in_order,
            prefetch_is_never_exceeded_and_opens_as_settlements_go,
            prefetch_can_be_changed_while_consuming,
            a_paused_session_fetches_nothing_but_settles_and_publishes,
            a_session_that_begins_paused_fetches_once_it_is_resumed,
            what_is_remembered_outlives_the_session_and_comes_before_deliveries,
            closing_gives_back_what_is_held,
            a_message_published_to_the_default_exchange_reaches_its_queue,
            a_message_published_to_a_direct_exchange_reaches_the_queues_bound_with_its_key,
            a_message_published_to_a_topic_exchange_reaches_the_queues_whose_pattern_matches,
            a_message_published_to_a_fanout_exchange_reaches_all_its_queues,
            a_published_message_arrives_as_it_was_sent,
            a_parked_message_takes_no_prefetch_and_comes_back_when_asked_for,
            a_queue_can_be_added_and_cancelled_while_consuming,
            a_control_message_reaches_every_session,
            what_is_listened_to_is_heard_past_the_prefetch_until_it_is_let_go,
            garbage_neither_ends_nor_blocks_a_queue,
            settling_what_is_not_held_is_ignored,
            what_is_still_held_after_a_reconnect_is_neither_delivered_again_nor_forgotten,
            two_workers_share_a_queue_and_no_message_runs_twice,
            a_session_reports_once_that_its_server_is_gone,
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

fn names(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| format!("task-{number:03}")).collect()
}

async fn publish_all<H: Harness>(harness: &H, queue: &Queue, ids: &[String]) {
    for id in ids {
        harness.publish(&queue.name, &message(id)).await;
    }
}

fn ids(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(|delivery| id(&delivery.message)).collect()
}

async fn nothing_is_left<H: Harness>(harness: &H, queue: &Queue) {
    wait_until("the queue is empty", async || harness.waiting(&queue.name).await == 0).await;
    wait_until("nothing is unsettled", async || harness.unsettled().await.unwrap_or(0) == 0).await;
}

pub(crate) async fn an_acknowledged_message_is_gone<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 4)).await;
    publish_all(&harness, &queue, &names(0..3)).await;
    let deliveries = client.take(3).await;
    for delivery in &deliveries {
        assert_eq!(delivery.info.queue, queue.name);
        assert!(!delivery.info.redelivered);
    }
    client.settle(deliveries, Settlement::Ack).await;
    client.expect_quiet("all were acknowledged").await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn messages_come_in_the_order_in_which_they_were_sent<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 8)).await;
    let sent = names(0..50);
    publish_all(&harness, &queue, &sent).await;
    let mut came = Vec::new();
    for _ in 0..50 {
        let delivery = client.next().await;
        came.push(id(&delivery.message));
        client.settle([delivery], Settlement::Ack).await;
    }
    assert_eq!(came, sent);
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn what_a_vanished_session_held_comes_back<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let broker = harness.broker();
    let consume = harness.consume(&[&queue], 8);
    let mut client = Client::connect(&*broker, &consume).await;
    publish_all(&harness, &queue, &names(0..3)).await;
    for delivery in client.take(3).await {
        delivery.handle.abandon();
    }
    client.vanish();

    let mut client = Client::connect(&*broker, &consume).await;
    let deliveries = client.take(3).await;
    assert_eq!(ids(&deliveries).into_iter().collect::<BTreeSet<_>>(), names(0..3).into_iter().collect());
    assert!(deliveries.iter().all(|delivery| delivery.info.redelivered));
    client.settle(deliveries, Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn what_a_dead_worker_held_comes_back_to_another<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let consume = harness.consume(&[&queue], 8);
    let dead = harness.broker();
    let mut client = Client::connect(&*dead, &consume).await;
    publish_all(&harness, &queue, &names(0..3)).await;
    for delivery in client.take(3).await {
        delivery.handle.abandon();
    }
    client.vanish();
    drop(dead);

    let mut client = Client::connect(&*harness.broker(), &consume).await;
    let deliveries = client.take(3).await;
    assert_eq!(ids(&deliveries).into_iter().collect::<BTreeSet<_>>(), names(0..3).into_iter().collect());
    client.settle(deliveries, Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn each_message_is_settled_exactly_once_in_whatever_order<H: Harness>(harness: H) {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 7)).await;
    let sent: HashSet<String> = names(0..60).into_iter().collect();
    publish_all(&harness, &queue, &names(0..60)).await;

    let mut held: HashMap<String, Delivery> = HashMap::new();
    let mut settled = HashSet::new();
    let mut put_back: HashMap<String, u32> = HashMap::new();
    while settled.len() < sent.len() {
        let full = held.len() == 7 || settled.len() + held.len() == sent.len();
        if held.is_empty() || (!full && random.bool()) {
            let delivery = client.next().await;
            let id = id(&delivery.message);
            assert!(!settled.contains(&id), "{id} came after it had been settled");
            assert_eq!(delivery.info.redelivered, put_back.contains_key(&id), "{id}");
            assert!(held.insert(id.clone(), delivery).is_none(), "{id} came while it was held");
            continue;
        }
        let chosen = random.choice(held.keys().cloned().collect::<Vec<_>>()).expect("something is held");
        let delivery = held.remove(&chosen).expect("it is held");
        let again = put_back.get(&chosen).copied().unwrap_or(0);
        let how = match random.u8(0..6) {
            0 => Settlement::Reject,
            1 if again < 3 => Settlement::Requeue,
            2 if again < 3 => Settlement::GiveBack,
            _ => Settlement::Ack,
        };
        match how {
            Settlement::Ack | Settlement::Reject => {
                settled.insert(chosen);
            }
            Settlement::Requeue | Settlement::GiveBack => *put_back.entry(chosen).or_default() += 1,
        }
        client.settle([delivery], how).await;
    }
    assert_eq!(settled, sent);
    client.expect_quiet("all are settled").await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_rejected_message_is_dropped<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    publish_all(&harness, &queue, &names(0..2)).await;
    let first = client.next().await;
    client.settle([first], Settlement::Reject).await;
    let second = client.next().await;
    assert_eq!(id(&second.message), "task-001");
    client.settle([second], Settlement::Ack).await;
    client.expect_quiet("the first was rejected").await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_requeued_message_comes_back_marked_redelivered<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    publish_all(&harness, &queue, &names(0..1)).await;
    let sent = message("task-000");
    let delivery = client.next().await;
    assert!(!delivery.info.redelivered);
    client.settle([delivery], Settlement::Requeue).await;
    let delivery = client.next().await;
    assert!(delivery.info.redelivered);
    assert_eq!(delivery.message.body, sent.body);
    assert_eq!(id(&delivery.message), "task-000");
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn what_is_given_back_comes_first_and_in_order<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let consume = harness.consume(&[&queue], 3);
    let mut client = Client::connect(&*harness.broker(), &consume).await;
    publish_all(&harness, &queue, &names(0..5)).await;
    let deliveries = client.take(3).await;
    // As a warm stop does it: nothing may be fetched again by the one who gives back.
    client.tell(Command::Pause).await;
    client.settle(deliveries, Settlement::GiveBack).await;
    client.close().await;
    wait_until("all wait again", async || harness.waiting(&queue.name).await == 5).await;

    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 8)).await;
    let deliveries = client.take(5).await;
    let (back, new) = if harness.gives_back_to_the_head() { (0..3, 3..5) } else { (2..5, 0..2) };
    assert_eq!(ids(&deliveries[back.clone()]), names(0..3));
    assert_eq!(ids(&deliveries[new.clone()]), names(3..5));
    assert!(deliveries[back].iter().all(|delivery| delivery.info.redelivered));
    assert!(!deliveries[new].iter().any(|delivery| delivery.info.redelivered));
    client.settle(deliveries, Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn prefetch_is_never_exceeded_and_opens_as_settlements_go<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    publish_all(&harness, &queue, &names(0..10)).await;
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 3)).await;
    let mut held = client.take(3).await;
    client.expect_quiet("three are held and prefetch is three").await;
    assert_eq!(harness.waiting(&queue.name).await, 7);
    let mut settled = 0;
    while settled < 10 {
        client.settle([held.remove(0)], Settlement::Ack).await;
        settled += 1;
        if settled + held.len() < 10 {
            held.push(client.next().await);
        }
        if settled == 4 {
            client.expect_quiet("one went and one came").await;
        }
    }
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn prefetch_can_be_changed_while_consuming<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    publish_all(&harness, &queue, &names(0..8)).await;
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    let mut held = client.take(1).await;
    client.expect_quiet("prefetch is one").await;
    client.tell(Command::Prefetch(4)).await;
    held.extend(client.take(3).await);
    client.expect_quiet("prefetch is four").await;
    client.tell(Command::Prefetch(2)).await;
    let two = held.split_off(2);
    client.settle(two, Settlement::Ack).await;
    client.expect_quiet("two are held and prefetch is two").await;
    client.settle(held, Settlement::Ack).await;
    let held = client.take(2).await;
    client.expect_quiet("prefetch is two").await;
    client.tell(Command::Prefetch(0)).await;
    let rest = client.take(2).await;
    client.settle(held.into_iter().chain(rest), Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_paused_session_fetches_nothing_but_settles_and_publishes<H: Harness>(harness: H) {
    let (queue, other) = (harness.queue("q"), harness.queue("other"));
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue, &other], 8)).await;
    publish_all(&harness, &queue, &names(0..1)).await;
    let delivery = client.next().await;
    client.tell(Command::Pause).await;
    client.send(&other.name, message("sent while paused")).await;
    client.expect_quiet("the session is paused").await;
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
    assert_eq!(harness.waiting(&other.name).await, 1);
}

pub(crate) async fn a_session_that_begins_paused_fetches_once_it_is_resumed<H: Harness>(harness: H) {
    let broker = harness.broker();
    if !broker.capabilities().parks {
        return;
    }
    let queue = harness.queue("q");
    publish_all(&harness, &queue, &names(0..2)).await;
    let mut consume = harness.consume(&[&queue], 1);
    consume.paused = true;
    let mut client = Client::connect(&*broker, &consume).await;
    client.expect_quiet("the session began paused").await;
    for _ in 0..2 {
        client.tell(Command::Resume).await;
        let delivery = client.next().await;
        // One that is settled before the pause makes no room.
        client.settle([delivery], Settlement::Ack).await;
        client.tell(Command::Pause).await;
        client.expect_quiet("the session is paused again").await;
    }
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn what_is_remembered_outlives_the_session_and_comes_before_deliveries<H: Harness>(
    harness: H,
) {
    if !harness.broker().capabilities().remembers {
        return;
    }
    let queue = harness.queue("q");
    let entry = |text: &str, keep: f64| (text.to_owned(), keep);
    {
        let client = Client::connect(&*harness.broker(), &harness.consume(&[], 1)).await;
        let entries = vec![entry("long", 600.0), entry("short", 60.0), entry("for ever", f64::INFINITY)];
        client.tell(Command::Remember(Remembrance { entries, most: 0 })).await;
        // Said again it lasts longer, never shorter.
        let entries = vec![entry("long", 1.0), entry("short", 700.0)];
        client.tell(Command::Remember(Remembrance { entries, most: 0 })).await;
        client.send(&queue.name, message("1")).await;
        client.close().await;
    }
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    assert_eq!(client.remembered().await, ["long", "short", "for ever"]);
    let delivery = client.next().await;
    client.settle([delivery], Settlement::Ack).await;
    let entries = vec![entry("new", 650.0)];
    client.tell(Command::Remember(Remembrance { entries, most: 2 })).await;
    client.close().await;
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[], 1)).await;
    assert_eq!(client.remembered().await, ["short", "for ever"], "those that end first go first");
    client.close().await;
}

pub(crate) async fn closing_gives_back_what_is_held<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let broker = harness.broker();
    let consume = harness.consume(&[&queue], 2);
    let mut client = Client::connect(&*broker, &consume).await;
    publish_all(&harness, &queue, &names(0..3)).await;
    for delivery in client.take(2).await {
        delivery.handle.abandon();
    }
    client.close().await;
    wait_until("all wait again", async || harness.waiting(&queue.name).await == 3).await;
    assert_eq!(harness.unsettled().await.unwrap_or(0), 0);

    let mut client = Client::connect(&*broker, &harness.consume(&[&queue], 8)).await;
    let deliveries = client.take(3).await;
    assert_eq!(ids(&deliveries), names(0..3));
    client.settle(deliveries, Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_message_published_to_the_default_exchange_reaches_its_queue<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 8)).await;
    client.send(&queue.name, message("mine")).await;
    let delivery = client.next().await;
    assert_eq!(id(&delivery.message), "mine");
    assert_eq!((delivery.info.exchange.as_str(), &delivery.info.routing_key), ("", &queue.name));
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

fn exchange(name: &str, kind: &str) -> Exchange {
    let Some(Binding { exchange, .. }) = Queue::named(name).bindings.pop() else {
        unreachable!("it has one")
    };
    Exchange { kind: kind.to_owned(), ..exchange }
}

fn bound<H: Harness>(harness: &H, base: &str, exchange: &Exchange, key: &str) -> Queue {
    let mut queue = harness.queue(base);
    queue.bindings[0].exchange = exchange.clone();
    queue.bindings[0].routing_key = key.to_owned();
    queue
}

/// Publishes one message a key and says which of two bound queues got which key.
async fn route<H: Harness>(
    harness: &H,
    kind: &str,
    bindings: [&str; 2],
    keys: &[&str],
) -> [BTreeSet<String>; 2] {
    let exchange = exchange(&harness.name("exchange"), kind);
    let (left, right) =
        (bound(harness, "left", &exchange, bindings[0]), bound(harness, "right", &exchange, bindings[1]));
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&left, &right], 0)).await;
    let mut seen = [BTreeSet::new(), BTreeSet::new()];
    for (number, key) in keys.iter().enumerate() {
        let publication = Publication {
            exchange: exchange.name.clone(),
            exchange_type: Some(kind.to_owned()),
            routing_key: (*key).to_owned(),
            message: message(&format!("{number} {key}")),
            declare: None,
        };
        client.publish(publication).await.unwrap();
    }
    // What is sent last to each queue comes last: by then the others are there.
    client.send(&left.name, message("last")).await;
    client.send(&right.name, message("last")).await;
    let mut lasts = 0;
    while lasts < 2 {
        let delivery = client.next().await;
        let id = id(&delivery.message);
        let side = usize::from(delivery.info.queue == right.name);
        match id.split_once(' ') {
            None => lasts += 1,
            Some((_, key)) => {
                assert_eq!(
                    (&delivery.info.exchange, delivery.info.routing_key.as_str()),
                    (&exchange.name, key)
                );
                assert!(seen[side].insert(key.to_owned()), "{key} came twice");
            }
        }
        client.settle([delivery], Settlement::Ack).await;
    }
    client.close().await;
    nothing_is_left(harness, &left).await;
    nothing_is_left(harness, &right).await;
    seen
}

fn set(keys: &[&str]) -> BTreeSet<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}

pub(crate) async fn a_message_published_to_a_direct_exchange_reaches_the_queues_bound_with_its_key<
    H: Harness,
>(
    harness: H,
) {
    let seen = route(&harness, "direct", ["a", "b"], &["a", "b", "c"]).await;
    assert_eq!(seen, [set(&["a"]), set(&["b"])]);
}

pub(crate) async fn a_message_published_to_a_topic_exchange_reaches_the_queues_whose_pattern_matches<
    H: Harness,
>(
    harness: H,
) {
    let keys = ["media.image.new", "media.new", "media.image", "mail.image.new", "mail"];
    let seen = route(&harness, "topic", ["media.*.new", "mail.#"], &keys).await;
    assert_eq!(seen[0], set(&["media.image.new"]));
    // kombu's virtual transports and RabbitMQ differ on whether `mail.#` takes `mail`.
    let mut right = seen[1].clone();
    right.remove("mail");
    assert_eq!(right, set(&["mail.image.new"]));
}

pub(crate) async fn a_message_published_to_a_fanout_exchange_reaches_all_its_queues<H: Harness>(harness: H) {
    if !harness.broker().capabilities().fanout {
        return;
    }
    let exchange = exchange(&harness.name("news"), "fanout");
    let (left, right) = (bound(&harness, "left", &exchange, ""), bound(&harness, "right", &exchange, ""));
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&left, &right], 8)).await;
    let publication = Publication {
        exchange: exchange.name.clone(),
        exchange_type: Some("fanout".to_owned()),
        routing_key: String::new(),
        message: message("news"),
        declare: None,
    };
    client.publish(publication).await.unwrap();
    let deliveries = client.take(2).await;
    assert_eq!(ids(&deliveries), ["news", "news"]);
    client.settle(deliveries, Settlement::Ack).await;
    client.expect_quiet("each queue had its copy").await;
    client.close().await;
}

pub(crate) async fn a_published_message_arrives_as_it_was_sent<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 8)).await;
    let mut sent = message("as it was");
    sent.body = bytes::Bytes::from((0..=255).collect::<Vec<u8>>());
    sent.content_type = Some("application/x-python-serialize".to_owned());
    sent.content_encoding = Some("binary".to_owned());
    client.send(&queue.name, sent.clone()).await;
    let delivery = client.next().await;
    let came = &delivery.message;
    assert_eq!(came.body, sent.body);
    assert_eq!((&came.content_type, &came.content_encoding), (&sent.content_type, &sent.content_encoding));
    assert_eq!(came.headers.value().unwrap(), sent.headers.value().unwrap());
    let properties = came.properties.value().unwrap();
    for (name, value) in sent.properties.value().unwrap().as_object().expect("an object") {
        // An empty or zero property is as good as an absent one, and RabbitMQ makes it so.
        if !matches!(value.as_str(), Some("")) && value.as_i64() != Some(0) {
            assert_eq!(properties[name], *value, "{name}");
        }
    }
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
}

pub(crate) async fn a_parked_message_takes_no_prefetch_and_comes_back_when_asked_for<H: Harness>(harness: H) {
    let broker = harness.broker();
    if !broker.capabilities().parks {
        return;
    }
    let queue = harness.queue("q");
    publish_all(&harness, &queue, &names(0..2)).await;
    let mut client = Client::connect(&*broker, &harness.consume(&[&queue], 1)).await;
    let first = client.next().await;
    let tag = first.handle.abandon();
    client.tell(Command::Park { tag, due: celeriac::clock::now() + 3600.0 }).await;
    let second = client.next().await;
    assert_eq!(id(&second.message), "task-001");
    client.expect_quiet("one is parked and one is held").await;
    client.settle([second], Settlement::Ack).await;
    client.tell(Command::Unpark(vec![tag])).await;
    let back = client.next().await;
    assert_eq!((back.handle.tag(), id(&back.message).as_str()), (tag, "task-000"));
    client.settle([back], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_queue_can_be_added_and_cancelled_while_consuming<H: Harness>(harness: H) {
    let (first, second) = (harness.queue("first"), harness.queue("second"));
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&first], 8)).await;
    client.consume(second.clone()).await.expect("the broker agrees");
    client.send(&second.name, message("added")).await;
    let delivery = client.next().await;
    assert_eq!((id(&delivery.message).as_str(), &delivery.info.queue), ("added", &second.name));
    client.tell(Command::Cancel(first.name.clone())).await;
    client.send(&first.name, message("too late")).await;
    client.expect_quiet("its queue is not consumed any more").await;
    assert_eq!(harness.waiting(&first.name).await, 1);
    client.send(&second.name, message("still consumed")).await;
    let another = client.next().await;
    assert_eq!(id(&another.message), "still consumed");
    client.settle([delivery, another], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &second).await;
}

pub(crate) async fn what_is_listened_to_is_heard_past_the_prefetch_until_it_is_let_go<H: Harness>(
    harness: H,
) {
    if !harness.broker().capabilities().listens {
        return;
    }
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    publish_all(&harness, &queue, &names(0..2)).await;
    let held = client.next().await;
    let side = |base: &str, kind: &str, key: &str| {
        // Not a quorum queue, which outlives its listeners.
        let mut queue = Queue::named(&harness.name(base));
        (queue.durable, queue.auto_delete, queue.no_ack) = (false, true, true);
        queue.bindings[0].exchange.kind = kind.to_owned();
        queue.bindings[0].routing_key = key.to_owned();
        queue
    };
    let sent = |queue: &Queue, key: &str, id: &str| Publication {
        exchange: queue.bindings[0].exchange.name.clone(),
        exchange_type: Some(queue.bindings[0].exchange.kind.clone()),
        routing_key: key.to_owned(),
        message: message(id),
        declare: None,
    };
    let (news, answers) = (side("news", "fanout", "worker.#"), side("answers", "direct", "k"));
    client.tell(Command::Listen(Box::new(news.clone()))).await;
    client.tell(Command::Listen(Box::new(answers.clone()))).await;
    client.publish(sent(&news, "worker.online", "1")).await.unwrap();
    let heard = client.heard().await;
    assert_eq!(
        (heard.queue, heard.routing_key, id(&heard.message)),
        (news.name.clone(), "worker.online".into(), "1".into())
    );
    client.publish(sent(&answers, "k", "2")).await.unwrap();
    let heard = client.heard().await;
    assert_eq!((heard.queue, id(&heard.message)), (answers.name.clone(), "2".into()));

    client.tell(Command::Deafen(answers.name.clone())).await;
    client.publish(sent(&answers, "k", "3")).await.unwrap();
    client.publish(sent(&news, "worker.offline", "4")).await.unwrap();
    assert_eq!(id(&client.heard().await.message), "4");
    client.settle([held], Settlement::Ack).await;
    let held = client.next().await;
    client.settle([held], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_control_message_reaches_every_session<H: Harness>(harness: H) {
    if !harness.broker().capabilities().fanout {
        return;
    }
    let queue = harness.queue("q");
    let mut consume = harness.consume(&[&queue], 1);
    consume.control = Some(harness.control());
    let mut one = Client::connect(&*harness.broker(), &consume).await;
    consume.node = "celery@other".to_owned();
    let mut two = Client::connect(&*harness.broker(), &consume).await;
    // A task that fills the prefetch must not keep remote control out.
    publish_all(&harness, &queue, &names(0..2)).await;
    let held = (one.next().await, two.next().await);

    let mut ping = message("ping");
    ping.body = bytes::Bytes::from_static(br#"{"method": "ping", "arguments": {}, "destination": null}"#);
    let publication = Publication {
        exchange: format!("{}.pidbox", harness.control().exchange),
        exchange_type: Some("fanout".to_owned()),
        routing_key: String::new(),
        message: ping.clone(),
        declare: None,
    };
    one.publish(publication).await.unwrap();
    assert_eq!(one.control().await.body, ping.body);
    assert_eq!(two.control().await.body, ping.body);
    one.settle([held.0], Settlement::Ack).await;
    two.settle([held.1], Settlement::Ack).await;
    one.close().await;
    two.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn garbage_neither_ends_nor_blocks_a_queue<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    publish_all(&harness, &queue, &names(0..1)).await;
    harness.publish_garbage(&queue.name).await;
    publish_all(&harness, &queue, &names(1..2)).await;
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 1)).await;
    let mut good = Vec::new();
    while good.len() < 2 {
        let delivery = client.next().await;
        // What is an envelope and no task is delivered: the worker decides about it.
        if let Ok(headers) = delivery.message.headers.value()
            && let Some(id) = headers["id"].as_str()
        {
            good.push(id.to_owned());
        }
        client.settle([delivery], Settlement::Ack).await;
    }
    assert_eq!(good, names(0..2));
    // A broker may think for a moment about what makes no sense.
    wait_until("the queue is empty", async || harness.waiting(&queue.name).await == 0).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn settling_what_is_not_held_is_ignored<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 4)).await;
    publish_all(&harness, &queue, &names(0..2)).await;
    let first = client.next().await;
    let tag = first.handle.tag();
    client.settle([first], Settlement::Ack).await;
    let second = client.next().await;
    client.tell(Command::Settle(vec![(tag, Settlement::Requeue), (u64::MAX, Settlement::Ack)])).await;
    client.expect_quiet("a tag settles once").await;
    client.settle([second], Settlement::Ack).await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn what_is_still_held_after_a_reconnect_is_neither_delivered_again_nor_forgotten<
    H: Harness,
>(
    harness: H,
) {
    let broker = harness.broker();
    if !broker.capabilities().settles_across_sessions {
        return;
    }
    let queue = harness.queue("q");
    publish_all(&harness, &queue, &names(0..3)).await;
    let mut consume = harness.consume(&[&queue], 2);
    let mut client = Client::connect(&*broker, &consume).await;
    let held = client.take(2).await;
    client.vanish();

    consume.held = held.iter().map(|delivery| delivery.handle.tag()).collect();
    let mut client = Client::connect(&*broker, &consume).await;
    client.expect_quiet("the two of the last session still count").await;
    client.settle(held, Settlement::Ack).await;
    let third = client.next().await;
    assert_eq!(id(&third.message), "task-002");
    client.settle([third], Settlement::Ack).await;
    client.expect_quiet("all are settled").await;
    client.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn two_workers_share_a_queue_and_no_message_runs_twice<H: Harness>(harness: H) {
    let queue = harness.queue("q");
    let consume = harness.consume(&[&queue], 3);
    let mut one = Client::connect(&*harness.broker(), &consume).await;
    let mut two = Client::connect(&*harness.broker(), &consume).await;
    publish_all(&harness, &queue, &names(0..80)).await;
    let mut seen = BTreeSet::new();
    while seen.len() < 80 {
        let (client, delivery) = tokio::select! {
            delivery = one.next() => (&one, delivery),
            delivery = two.next() => (&two, delivery),
        };
        let id = id(&delivery.message);
        assert!(seen.insert(id.clone()), "{id} came twice");
        client.settle([delivery], Settlement::Ack).await;
    }
    one.expect_quiet("all are settled").await;
    two.expect_quiet("all are settled").await;
    one.close().await;
    two.close().await;
    nothing_is_left(&harness, &queue).await;
}

pub(crate) async fn a_session_reports_once_that_its_server_is_gone<H: Harness>(mut harness: H) {
    let queue = harness.queue("q");
    let broker = harness.broker();
    let client = Client::connect(&*broker, &harness.consume(&[&queue], 1)).await;
    if !harness.kill_server() {
        client.close().await;
        return;
    }
    let error = client.lost().await;
    assert!(error.is_retryable(), "{error}");
    let Err(error) = broker.connect(&harness.consume(&[&queue], 1)).await else {
        panic!("a server that is gone was connected to")
    };
    assert!(error.is_retryable(), "{error}");
}
