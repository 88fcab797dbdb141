//! A session as a test uses it.

use std::collections::VecDeque;
use std::time::Duration;

use celeriac::broker::topology::Queue;
use celeriac::broker::{
    Broker, Command, Consume, Delivery, Event, Heard, Publication, Session, Settlement, Tag,
};
use celeriac::error::BrokerError;
use celeriac::protocol::Message;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::support::DEADLINE;

/// Long enough for a broker that delivers too much to be caught doing so; a slow one passes, none fails.
const QUIET: Duration = Duration::from_millis(150);

/// A worker's end of a session.
pub(crate) struct Client {
    session: Session,
    deliveries: VecDeque<Delivery>,
    controls: VecDeque<Message>,
    heard: VecDeque<Heard>,
    forgotten: Vec<Tag>,
    remembered: Option<Vec<String>>,
}

impl Client {
    /// Connects.
    pub(crate) async fn connect(broker: &dyn Broker, consume: &Consume) -> Self {
        let session = timeout(DEADLINE, broker.connect(consume)).await.expect("connecting ends").unwrap();
        Self {
            session,
            deliveries: VecDeque::new(),
            controls: VecDeque::new(),
            heard: VecDeque::new(),
            forgotten: Vec::new(),
            remembered: None,
        }
    }

    fn keep(&mut self, event: Event) -> Option<BrokerError> {
        match event {
            Event::Deliveries(batch) => {
                assert!(!batch.is_empty(), "an event without deliveries");
                self.deliveries.extend(batch);
            }
            Event::Control(message) => self.controls.push_back(message),
            Event::Heard(heard) => self.heard.push_back(heard),
            Event::Forgotten(tags) => self.forgotten.extend(tags),
            Event::Remembered(texts) => {
                assert!(self.deliveries.is_empty(), "it comes before the first deliveries");
                self.remembered = Some(texts);
            }
            Event::Renewed(count) => assert!(count > 0, "an event without renewals"),
            Event::Lost(error) => return Some(error),
        }
        None
    }

    async fn event(&mut self, what: &str) {
        let event = timeout(DEADLINE, self.session.events.recv()).await;
        let event = event.unwrap_or_else(|_| panic!("waited in vain for {what}"));
        let event = event.unwrap_or_else(|| panic!("the session ended before {what}"));
        if let Some(error) = self.keep(event) {
            panic!("the session was lost before {what}: {error}");
        }
    }

    /// What the broker remembers.
    pub(crate) async fn remembered(&mut self) -> Vec<String> {
        while self.remembered.is_none() {
            self.event("what is remembered").await;
        }
        self.remembered.take().expect("just looked")
    }

    /// The next delivery.
    pub(crate) async fn next(&mut self) -> Delivery {
        while self.deliveries.is_empty() {
            self.event("a delivery").await;
        }
        self.deliveries.pop_front().expect("just looked")
    }

    /// The next `count` deliveries.
    pub(crate) async fn take(&mut self, count: usize) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.push(self.next().await);
        }
        taken
    }

    /// The next message that was listened to.
    pub(crate) async fn heard(&mut self) -> Heard {
        while self.heard.is_empty() {
            self.event("something to be heard").await;
        }
        self.heard.pop_front().expect("just looked")
    }

    /// The next remote control message.
    pub(crate) async fn control(&mut self) -> Message {
        while self.controls.is_empty() {
            self.event("a control message").await;
        }
        self.controls.pop_front().expect("just looked")
    }

    /// Waits until the broker has said that it no longer knows this delivery.
    pub(crate) async fn forgets(&mut self, tag: Tag) {
        while !self.forgotten.contains(&tag) {
            self.event("the broker to forget").await;
        }
    }

    /// Consumes one more queue, and hears what the broker says to that.
    pub(crate) async fn consume(&mut self, queue: Queue) -> Result<(), BrokerError> {
        let (answer, heard) = oneshot::channel();
        self.tell(Command::Consume(Box::new(queue), answer)).await;
        timeout(DEADLINE, heard).await.expect("an answer in time").expect("the session goes on")
    }

    /// Listens for a while: how many deliveries have come that nobody has taken yet.
    pub(crate) async fn pending(&mut self) -> usize {
        while let Ok(Some(event)) = timeout(QUIET, self.session.events.recv()).await {
            if let Some(error) = self.keep(event) {
                panic!("the session was lost: {error}");
            }
        }
        self.deliveries.len()
    }

    /// Nothing more is delivered.
    pub(crate) async fn expect_quiet(&mut self, why: &str) {
        let pending = self.pending().await;
        assert_eq!(pending, 0, "{pending} deliveries although {why}");
    }

    /// The last event of a session whose server has gone.
    pub(crate) async fn lost(mut self) -> BrokerError {
        loop {
            let event = timeout(DEADLINE, self.session.events.recv()).await.expect("the loss is noticed");
            if let Some(error) = self.keep(event.expect("`Lost` comes before the end")) {
                assert!(self.session.events.recv().await.is_none(), "something followed `Lost`");
                self.abandon();
                return error;
            }
        }
    }

    /// Sends a command.
    pub(crate) async fn tell(&self, command: Command) {
        timeout(DEADLINE, self.session.commands.send(command))
            .await
            .expect("commands are taken")
            .unwrap_or_else(|_| panic!("the session has ended"));
    }

    /// Sends a command, unless the session has ended.
    pub(crate) async fn try_tell(&self, command: Command) -> bool {
        self.session.commands.send(command).await.is_ok()
    }

    /// Settles deliveries, in this order.
    pub(crate) async fn settle(&self, deliveries: impl IntoIterator<Item = Delivery>, how: Settlement) {
        let pairs = deliveries.into_iter().map(|delivery| delivery.handle.settle(how)).collect();
        self.tell(Command::Settle(pairs)).await;
    }

    /// Publishes and waits for the answer: everything told before is carried out by then.
    pub(crate) async fn publish(&self, publication: Publication) -> Result<(), BrokerError> {
        let (answer, answered) = oneshot::channel();
        self.tell(Command::Publish(Box::new(publication), answer)).await;
        timeout(DEADLINE, answered).await.expect("publishing ends").expect("an answer comes")
    }

    /// Publishes without waiting; the answer comes later.
    pub(crate) async fn begin(&self, publication: Publication) -> oneshot::Receiver<Result<(), BrokerError>> {
        let (answer, answered) = oneshot::channel();
        self.tell(Command::Publish(Box::new(publication), answer)).await;
        answered
    }

    /// Publishes to a queue by the default exchange.
    pub(crate) async fn send(&self, queue: &str, message: Message) {
        let publication = Publication {
            exchange: String::new(),
            exchange_type: None,
            routing_key: queue.to_owned(),
            message,
            declare: None,
        };
        self.publish(publication).await.unwrap();
    }

    /// Closes the session in order.
    pub(crate) async fn close(mut self) {
        self.abandon();
        let (answer, answered) = oneshot::channel();
        self.tell(Command::Close(answer)).await;
        let events = async { while self.session.events.recv().await.is_some() {} };
        tokio::select! {
            answered = timeout(DEADLINE, answered) => {
                answered.expect("closing ends").expect("an answer comes");
            }
            // A session may drop its events before it answers.
            () = async { events.await; std::future::pending::<()>().await } => {}
        }
        while let Ok(event) = self.session.events.try_recv() {
            self.keep(event);
        }
        self.abandon();
    }

    /// Ends the session as a worker's death does: nothing is said to the broker.
    pub(crate) fn vanish(mut self) {
        while let Ok(event) = self.session.events.try_recv() {
            self.keep(event);
        }
        self.abandon();
    }

    fn abandon(&mut self) {
        for delivery in self.deliveries.drain(..) {
            delivery.handle.abandon();
        }
    }
}
