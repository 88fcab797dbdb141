//! The suite on RabbitMQ: a virtual host a check, a plain lapin connection in the part of the producer.

use std::sync::Arc;

use celeriac::broker::topology::Queue;
use celeriac::broker::{Broker, by_url};
use celeriac::protocol::Message;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::{Value, json};

use super::Harness;
use crate::support::rabbitmq::{RabbitServer, Vhost};

/// A virtual host of the shared server.
pub(crate) struct AmqpHarness {
    pub(crate) vhost: Vhost<'static>,
    producer: Connection,
}

/// A broker without any settings.
pub(crate) fn broker(url: &str) -> Arc<dyn Broker> {
    let config = json!({"urls": [url], "retry": true, "retry_on_startup": true});
    let config = serde_json::from_value(config).expect("a configuration");
    by_url(url, &config).expect("a good address").expect("AMQP is native")
}

impl AmqpHarness {
    /// A fresh virtual host of this server.
    pub(crate) async fn on(server: &'static RabbitServer) -> Self {
        let vhost = server.vhost();
        let producer = Connection::connect(&vhost.url(), ConnectionProperties::default()).await.unwrap();
        Self { vhost, producer }
    }

    /// A channel of the producer.
    pub(crate) async fn channel(&self) -> Channel {
        let channel = self.producer.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        channel
    }

    /// Publishes with these properties to a queue, declared as Celery declares a missing one.
    pub(crate) async fn publish_with(&self, queue: &str, properties: BasicProperties, body: &[u8]) {
        self.publish_to(queue, FieldTable::default(), properties, body).await;
    }

    async fn publish_to(&self, queue: &str, arguments: FieldTable, properties: BasicProperties, body: &[u8]) {
        let channel = self.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let exchange = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let none = FieldTable::default;
        channel.exchange_declare(queue.into(), ExchangeKind::Direct, exchange, none()).await.unwrap();
        channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
        channel
            .queue_bind(queue.into(), queue.into(), queue.into(), QueueBindOptions::default(), none())
            .await
            .unwrap();
        let options = BasicPublishOptions::default();
        let confirm = channel
            .basic_publish("".into(), queue.into(), options, body, properties)
            .await
            .unwrap()
            .await
            .unwrap();
        assert!(confirm.is_ack());
    }
}

fn properties(message: &Message) -> BasicProperties {
    BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_headers(table(&message.headers.value().unwrap()))
        .with_delivery_mode(2)
        .with_correlation_id(super::id(message).into())
}

fn table(value: &Value) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in value.as_object().expect("an object") {
        table.insert(ShortString::from(name.as_str()), field(value));
    }
    table
}

fn field(value: &Value) -> AMQPValue {
    match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(value) => AMQPValue::Boolean(*value),
        Value::Number(value) => AMQPValue::LongLongInt(value.as_i64().expect("an integer")),
        Value::String(text) => AMQPValue::LongString(LongString::from(text.as_str())),
        Value::Array(values) => AMQPValue::FieldArray(values.iter().map(field).collect::<Vec<_>>().into()),
        Value::Object(_) => AMQPValue::FieldTable(table(value)),
    }
}

impl Harness for AmqpHarness {
    async fn start() -> Option<Self> {
        Some(Self::on(RabbitServer::shared()?).await)
    }

    fn broker(&self) -> Arc<dyn Broker> {
        broker(&self.vhost.url())
    }

    fn name(&self, base: &str) -> String {
        base.to_owned()
    }

    async fn publish(&self, queue: &str, message: &Message) {
        self.publish_with(queue, properties(message), &message.body).await;
    }

    async fn publish_garbage(&self, queue: &str) {
        let mut headers = FieldTable::default();
        headers.insert("task".into(), AMQPValue::ByteArray(vec![0xff, 0xfe].into()));
        headers.insert("long".into(), AMQPValue::LongString(LongString::from(vec![0xc3, 0x28])));
        for properties in [BasicProperties::default(), BasicProperties::default().with_headers(headers)] {
            self.publish_with(queue, properties, b"\xff\x00").await;
        }
    }

    async fn waiting(&self, queue: &str) -> usize {
        let channel = self.producer.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        match channel.queue_declare(queue.into(), passive, FieldTable::default()).await {
            Ok(queue) => queue.message_count() as usize,
            Err(_) => 0,
        }
    }

    async fn unsettled(&self) -> Option<usize> {
        let rows = self.vhost.list("list_queues", &["messages_unacknowledged"]);
        Some(rows.iter().filter_map(|row| row["messages_unacknowledged"].as_u64()).sum::<u64>() as usize)
    }
}

/// The same with quorum queues, where prefetch is counted per consumer.
pub(crate) struct QuorumHarness(AmqpHarness);

impl QuorumHarness {
    fn arguments() -> Value {
        json!({"x-queue-type": "quorum"})
    }
}

impl Harness for QuorumHarness {
    async fn start() -> Option<Self> {
        Some(Self(AmqpHarness::start().await?))
    }

    fn broker(&self) -> Arc<dyn Broker> {
        self.0.broker()
    }

    fn name(&self, base: &str) -> String {
        self.0.name(base)
    }

    async fn publish(&self, queue: &str, message: &Message) {
        self.0.publish_to(queue, table(&Self::arguments()), properties(message), &message.body).await;
    }

    async fn publish_garbage(&self, queue: &str) {
        self.0.publish_to(queue, table(&Self::arguments()), BasicProperties::default(), b"\xff\x00").await;
    }

    async fn waiting(&self, queue: &str) -> usize {
        self.0.waiting(queue).await
    }

    async fn unsettled(&self) -> Option<usize> {
        self.0.unsettled().await
    }

    fn gives_back_to_the_head(&self) -> bool {
        false
    }

    fn queue(&self, base: &str) -> Queue {
        let mut queue = Queue::named(&self.name(base));
        queue.arguments = Self::arguments().as_object().expect("an object").clone();
        queue
    }
}
