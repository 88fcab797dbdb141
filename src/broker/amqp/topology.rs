//! Declares exchanges, queues and bindings, in kombu's order and with py-amqp's argument types.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::{Channel, ExchangeKind};
use serde_json::{Map, Value};

use super::fault::{Fault, short};
use super::table;
use crate::broker::Control;
use crate::broker::topology::{Binding, Exchange, Queue};

/// Declares a queue with all that makes messages reach it.
pub(super) async fn declare(channel: &Channel, queue: &Queue) -> Result<(), Fault> {
    if queue.no_declare {
        return Ok(());
    }
    let own = queue.bindings.first();
    if let Some(binding) = own {
        declare_exchange(channel, &binding.exchange).await?;
    }
    let options = QueueDeclareOptions {
        passive: false,
        durable: queue.durable,
        exclusive: queue.exclusive,
        auto_delete: queue.auto_delete,
        nowait: false,
    };
    channel.queue_declare(short(&queue.name)?, options, table::from_json(&queue.arguments)).await?;
    if let Some(binding) = own {
        bind(channel, queue, binding).await?;
    }
    for binding in queue.bindings.iter().skip(1) {
        declare_exchange(channel, &binding.exchange).await?;
        bind(channel, queue, binding).await?;
    }
    Ok(())
}

/// As [`declare`], and a queue that is never declared has to be there already: consuming one that is not would
/// close the channel of all others.
pub(super) async fn require(channel: &Channel, queue: &Queue) -> Result<(), Fault> {
    if queue.no_declare {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(short(&queue.name)?, options, table::from_json(&Map::new())).await?;
    }
    declare(channel, queue).await
}

/// Declares an exchange, unless it is one of the broker's own.
pub(super) async fn declare_exchange(channel: &Channel, exchange: &Exchange) -> Result<(), Fault> {
    if exchange.no_declare || exchange.name.is_empty() || exchange.name.starts_with("amq.") {
        return Ok(());
    }
    let options = ExchangeDeclareOptions {
        passive: exchange.passive,
        durable: exchange.durable,
        auto_delete: exchange.auto_delete,
        internal: false,
        nowait: false,
    };
    let arguments = table::from_json(&exchange.arguments);
    channel.exchange_declare(short(&exchange.name)?, kind(&exchange.kind), options, arguments).await?;
    Ok(())
}

async fn bind(channel: &Channel, queue: &Queue, binding: &Binding) -> Result<(), Fault> {
    // Every queue is bound to the default exchange by the broker; it refuses to be told so.
    if binding.exchange.name.is_empty() {
        return Ok(());
    }
    let (name, exchange, key) =
        (short(&queue.name)?, short(&binding.exchange.name)?, short(&binding.routing_key)?);
    let arguments = table::from_json(&binding.arguments);
    channel.queue_bind(name, exchange, key, QueueBindOptions::default(), arguments).await?;
    Ok(())
}

fn kind(name: &str) -> ExchangeKind {
    match name {
        "direct" => ExchangeKind::Direct,
        "fanout" => ExchangeKind::Fanout,
        "topic" => ExchangeKind::Topic,
        "headers" => ExchangeKind::Headers,
        other => ExchangeKind::Custom(other.to_owned()),
    }
}

/// An exchange by name and type alone. The mailboxes of remote control (`….pidbox`) live with the broker's
/// process, as kombu declares them; all others survive it.
pub(super) fn exchange(name: &str, kind: &str) -> Exchange {
    Exchange {
        name: name.to_owned(),
        kind: kind.to_owned(),
        durable: !name.ends_with(".pidbox"),
        auto_delete: false,
        passive: false,
        no_declare: false,
        arguments: Map::new(),
    }
}

/// The queue of remote control, as Celery 5.7 declares it.
pub(super) fn control_queue(node: &str, control: &Control) -> Queue {
    let mut arguments = Map::new();
    for (name, seconds) in [("x-expires", control.queue_expires), ("x-message-ttl", control.queue_ttl)] {
        if let Some(seconds) = seconds {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "as Python's int(); a TTL of 292 million years is none"
            )]
            arguments.insert(name.to_owned(), Value::from((seconds * 1000.0) as i64));
        }
    }
    let mailbox = format!("{}.pidbox", control.exchange);
    Queue {
        name: format!("{node}.{mailbox}"),
        bindings: vec![Binding {
            exchange: exchange(&mailbox, "fanout"),
            routing_key: String::new(),
            arguments: Map::new(),
        }],
        durable: control.queue_durable,
        exclusive: control.queue_exclusive,
        auto_delete: !control.queue_durable,
        no_declare: false,
        no_ack: true,
        arguments,
        consumer_arguments: Map::new(),
        alias: None,
        shown: None,
    }
}
