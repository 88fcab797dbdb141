use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::*;
use crate::broker::{BrokerConfig, COMMAND_CAPACITY, Capabilities, EVENT_CAPACITY, Handle};
use crate::protocol::{DeliveryInfo, Json, Message};

/// The far end of a session.
struct Far {
    events: mpsc::Sender<Event>,
    commands: mpsc::Receiver<Command>,
    held: HashSet<Tag>,
    queues: Vec<String>,
}

/// A broker whose sessions the test plays.
struct Played {
    remembers: bool,
    sessions: mpsc::UnboundedSender<Far>,
    refusals: Mutex<Vec<BrokerError>>,
}

#[async_trait]
impl Broker for Played {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            settles_across_sessions: self.remembers,
            parks: false,
            fanout: false,
            remembers: false,
            listens: false,
        }
    }

    fn address(&self) -> String {
        "played://".to_owned()
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        if let Some(error) = self.refusals.lock().unwrap().pop() {
            return Err(error);
        }
        let (events_in, events) = mpsc::channel(EVENT_CAPACITY);
        let (commands, commands_out) = mpsc::channel(COMMAND_CAPACITY);
        let queues = consume.queues.iter().map(|queue| queue.name.clone()).collect();
        let far = Far { events: events_in, commands: commands_out, held: consume.held.clone(), queues };
        self.sessions.send(far).unwrap_or_else(|_| panic!("the test has ended"));
        Ok(Session { events, commands, tasks: JoinSet::new() })
    }
}

fn link(remembers: bool, refusals: Vec<BrokerError>) -> (Link, mpsc::UnboundedReceiver<Far>) {
    let (sessions, fars) = mpsc::unbounded_channel();
    let broker = Played { remembers, sessions, refusals: Mutex::new(refusals) };
    let config: BrokerConfig = serde_json::from_value(
        serde_json::json!({"urls": ["played://"], "retry": true, "retry_on_startup": true}),
    )
    .unwrap();
    let consume = Consume {
        node: "celery@tests".to_owned(),
        queues: Vec::new(),
        prefetch: 4,
        paused: false,
        control: None,
        held: HashSet::new(),
    };
    (Link::new(Failover::new(vec![Arc::new(broker)], &config), consume), fars)
}

fn delivery(tag: Tag) -> Delivery {
    let message = Message {
        content_type: None,
        content_encoding: None,
        headers: Json::empty(),
        properties: Json::empty(),
        body: bytes::Bytes::new(),
    };
    Delivery { message, info: DeliveryInfo::default(), handle: Handle::new(tag) }
}

fn away() -> BrokerError {
    BrokerError::Connection { address: "played://".to_owned(), reason: "cut".to_owned() }
}

async fn up(link: &mut Link, fars: &mut mpsc::UnboundedReceiver<Far>) -> Far {
    let event = link.next().await;
    assert!(matches!(event, LinkEvent::Up { .. }), "{event:?}");
    fars.recv().await.unwrap()
}

/// Has these deliveries arrive, and gives their handles.
async fn arrive(link: &mut Link, far: &Far, tags: &[Tag]) -> Vec<Handle> {
    far.events.send(Event::Deliveries(tags.iter().copied().map(delivery).collect())).await.unwrap();
    match link.next().await {
        LinkEvent::Broker(Event::Deliveries(deliveries)) => {
            deliveries.into_iter().map(|delivery| delivery.handle).collect()
        }
        other => panic!("{other:?}"),
    }
}

async fn lose(link: &mut Link, far: Far) {
    far.events.send(Event::Lost(away())).await.unwrap();
    let event = link.next().await;
    assert!(matches!(event, LinkEvent::Lost(_)), "{event:?}");
}

fn told(far: &mut Far) -> Vec<(Tag, Settlement)> {
    let mut told = Vec::new();
    while let Ok(command) = far.commands.try_recv() {
        match command {
            Command::Settle(batch) => told.extend(batch),
            other => panic!("{other:?}"),
        }
    }
    told
}

#[tokio::test]
async fn settlements_travel_together_and_each_delivery_is_settled_once() {
    let (mut link, mut fars) = link(true, Vec::new());
    let mut far = up(&mut link, &mut fars).await;
    let handles = arrive(&mut link, &far, &[1, 2]).await;
    assert!(link.holds(1) && link.holds(2));
    for handle in handles {
        link.settle(handle.settle(Settlement::Ack));
    }
    link.settle((1, Settlement::Reject));
    link.flush();
    assert_eq!(told(&mut far), [(1, Settlement::Ack), (2, Settlement::Ack)]);
    assert!(!link.holds(1));
}

#[tokio::test]
async fn where_the_broker_remembers_the_next_session_is_told_what_the_lost_one_was_not() {
    let (mut link, mut fars) = link(true, Vec::new());
    let far = up(&mut link, &mut fars).await;
    let mut handles = arrive(&mut link, &far, &[1, 2]).await;
    lose(&mut link, far).await;
    link.settle(handles.remove(0).settle(Settlement::Ack));
    link.flush();
    let mut far = up(&mut link, &mut fars).await;
    // Both are kept alive: the broker does not know yet that one of them is done.
    assert_eq!(far.held, HashSet::from([1, 2]));
    link.flush();
    assert_eq!(told(&mut far), [(1, Settlement::Ack)]);
    handles.remove(0).abandon();
}

#[tokio::test]
async fn where_the_broker_forgets_nothing_of_a_lost_session_is_settled() {
    let (mut link, mut fars) = link(false, Vec::new());
    let far = up(&mut link, &mut fars).await;
    let handles = arrive(&mut link, &far, &[1]).await;
    lose(&mut link, far).await;
    assert!(!link.holds(1));
    for handle in handles {
        link.settle(handle.settle(Settlement::Ack));
    }
    let mut far = up(&mut link, &mut fars).await;
    link.flush();
    assert!(far.held.is_empty());
    assert_eq!(told(&mut far), []);
}

#[tokio::test]
async fn a_tag_that_the_broker_took_back_is_not_settled() {
    let (mut link, mut fars) = link(true, Vec::new());
    let mut far = up(&mut link, &mut fars).await;
    let handles = arrive(&mut link, &far, &[1]).await;
    far.events.send(Event::Forgotten(vec![1])).await.unwrap();
    assert!(matches!(link.next().await, LinkEvent::Broker(Event::Forgotten(_))));
    for handle in handles {
        link.settle(handle.settle(Settlement::Ack));
    }
    link.flush();
    assert_eq!(told(&mut far), []);
}

#[tokio::test]
async fn a_failed_attempt_is_told_with_the_wait_before_the_next() {
    let (mut link, mut fars) = link(true, vec![away()]);
    match link.next().await {
        LinkEvent::Failed { wait, attempt: 1, most: None, .. } => assert!(!wait.is_zero()),
        other => panic!("{other:?}"),
    }
    assert!(fars.try_recv().is_err() && !link.is_up());
}

#[tokio::test]
async fn a_pause_holds_for_the_next_session() {
    let (mut link, mut fars) = link(true, Vec::new());
    let far = up(&mut link, &mut fars).await;
    link.send(Command::Pause);
    lose(&mut link, far).await;
    let mut far = up(&mut link, &mut fars).await;
    link.flush();
    let paused =
        std::iter::from_fn(|| far.commands.try_recv().ok()).any(|command| matches!(command, Command::Pause));
    assert!(paused);
}

/// Has a queue asked for; gives who waits for the answer, and the broker's way to give it.
fn ask(
    link: &mut Link,
    far: &mut Far,
    name: &str,
) -> (oneshot::Receiver<Consuming>, oneshot::Sender<Consuming>) {
    let (answer, heard) = oneshot::channel();
    link.consume(Queue::named(name), answer);
    link.flush();
    (heard, asked_for(far, name))
}

fn asked_for(far: &mut Far, name: &str) -> oneshot::Sender<Consuming> {
    match far.commands.try_recv() {
        Ok(Command::Consume(queue, told)) if queue.name == name => told,
        other => panic!("{other:?}"),
    }
}

async fn answered(link: &mut Link, heard: oneshot::Receiver<Consuming>) -> Consuming {
    tokio::select! {
        event = link.next() => panic!("{event:?}"),
        outcome = heard => outcome.unwrap(),
    }
}

#[tokio::test]
async fn a_queue_that_the_broker_refuses_is_not_asked_for_again() {
    let (mut link, mut fars) = link(true, Vec::new());
    let mut far = up(&mut link, &mut fars).await;
    let (heard, told) = ask(&mut link, &mut far, "other");
    let refusal = BrokerError::Refused { address: "played://".to_owned(), reason: "no".to_owned() };
    told.send(Err(refusal)).unwrap();
    assert_eq!(answered(&mut link, heard).await.unwrap_err().reason(), "no");
    lose(&mut link, far).await;
    assert!(up(&mut link, &mut fars).await.queues.is_empty());
}

#[tokio::test]
async fn a_queue_that_the_broker_lets_us_consume_is_consumed_in_the_next_session_too() {
    let (mut link, mut fars) = link(true, Vec::new());
    let mut far = up(&mut link, &mut fars).await;
    let (heard, told) = ask(&mut link, &mut far, "other");
    assert!(link.queues().is_empty());
    told.send(Ok(())).unwrap();
    assert!(answered(&mut link, heard).await.is_ok());
    lose(&mut link, far).await;
    assert_eq!(up(&mut link, &mut fars).await.queues, ["other"]);
}

#[tokio::test]
async fn an_answer_counts_that_came_just_before_the_loss_and_none_is_a_failure() {
    let (mut link, mut fars) = link(true, Vec::new());
    let mut far = up(&mut link, &mut fars).await;
    let (agreed, told) = ask(&mut link, &mut far, "agreed");
    let (unanswered, _told) = ask(&mut link, &mut far, "unanswered");
    told.send(Ok(())).unwrap();
    lose(&mut link, far).await;
    assert_eq!(up(&mut link, &mut fars).await.queues, ["agreed"]);
    assert!(agreed.await.unwrap().is_ok());
    assert_eq!(unanswered.await.unwrap().unwrap_err().reason(), "cut");
}

#[tokio::test]
async fn a_queue_wanted_while_the_broker_is_away_is_asked_for_when_it_is_back() {
    let (mut link, mut fars) = link(true, Vec::new());
    let far = up(&mut link, &mut fars).await;
    lose(&mut link, far).await;
    let (answer, heard) = oneshot::channel();
    link.consume(Queue::named("late"), answer);
    let mut far = up(&mut link, &mut fars).await;
    assert!(far.queues.is_empty());
    link.flush();
    asked_for(&mut far, "late").send(Ok(())).unwrap();
    assert!(answered(&mut link, heard).await.is_ok());
}

#[tokio::test]
async fn closing_tells_the_broker_what_it_is_owed_also_over_a_new_connection() {
    let (mut link, mut fars) = link(true, Vec::new());
    let far = up(&mut link, &mut fars).await;
    let handles = arrive(&mut link, &far, &[1]).await;
    lose(&mut link, far).await;
    for handle in handles {
        link.settle(handle.settle(Settlement::Ack));
    }
    let play = async {
        let mut far = fars.recv().await.unwrap();
        let mut told = Vec::new();
        while let Some(command) = far.commands.recv().await {
            match command {
                Command::Settle(batch) => told.extend(batch),
                Command::Close(done) => {
                    let _ = done.send(());
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        told
    };
    let deadline = Instant::now() + std::time::Duration::from_secs(30);
    let ((), told) = tokio::join!(link.close(deadline), play);
    assert_eq!(told, [(1, Settlement::Ack)]);
}
