//! Requests and queues as replies show them.

use serde_json::{Map, Value, json};

use super::panel::Request;
use crate::broker::topology::{Exchange, Queue};
use crate::protocol::json;

/// A request. `safe`: arguments as text; else the values themselves where they can be read without running code.
pub(super) fn request(request: &Request<'_>, node: &str, safe: bool) -> Value {
    let text = |shown: &Option<String>| Value::from(shown.clone().unwrap_or_default());
    let (args, kwargs) = match if safe { None } else { arguments(request) } {
        Some(values) => values,
        None => (text(&request.headers.argsrepr), text(&request.headers.kwargsrepr)),
    };
    let priority =
        request.message.and_then(|message| message.properties.value().ok()?.get("priority").cloned());
    json!({
        "id": request.headers.id,
        "name": request.headers.display_name(),
        "args": args,
        "kwargs": kwargs,
        "type": request.headers.task,
        "hostname": node,
        "time_start": request.time_start,
        "acknowledged": request.acknowledged,
        "delivery_info": {
            "exchange": request.info.exchange,
            "routing_key": request.info.routing_key,
            "priority": priority,
            "redelivered": request.info.redelivered,
        },
        "worker_pid": request.worker_pid,
    })
}

/// The arguments, of a body that is JSON and not compressed.
fn arguments(request: &Request<'_>) -> Option<(Value, Value)> {
    let message = request.message?;
    if message.content_type.as_deref() != Some("application/json") {
        return None;
    }
    if message.headers.value().ok()?.get("compression").is_some_and(|compression| !compression.is_null()) {
        return None;
    }
    let parts = json::elements(std::str::from_utf8(&message.body).ok()?).ok()?;
    let value = |index: usize| serde_json::from_str(parts.get(index)?).ok();
    Some((value(0)?, value(1)?))
}

/// A queue, as kombu's `as_dict` gives it.
pub(super) fn queue(queue: &Queue) -> Value {
    if let Some(shown) = &queue.shown {
        return shown.clone();
    }
    let first = queue.bindings.first();
    let argument = |name: &str| queue.arguments.get(name).cloned().unwrap_or(Value::Null);
    let seconds = |name: &str| argument(name).as_f64().map_or(Value::Null, |value| json!(value / 1000.0));
    json!({
        "name": queue.name,
        "exchange": first.map(|binding| exchange(&binding.exchange)),
        "routing_key": first.map_or("", |binding| &binding.routing_key),
        "queue_arguments": or_null(&queue.arguments),
        "binding_arguments": first.map_or(Value::Null, |binding| or_null(&binding.arguments)),
        "consumer_arguments": or_null(&queue.consumer_arguments),
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "no_ack": queue.no_ack,
        "alias": queue.alias,
        "bindings": queue.bindings.iter().skip(1).map(|binding| json!({
            "exchange": exchange(&binding.exchange),
            "routing_key": binding.routing_key,
            "arguments": or_null(&binding.arguments),
        })).collect::<Vec<_>>(),
        "no_declare": queue.no_declare.then_some(true),
        "expires": seconds("x-expires"),
        "message_ttl": seconds("x-message-ttl"),
        "max_length": argument("x-max-length"),
        "max_length_bytes": argument("x-max-length-bytes"),
        "max_priority": argument("x-max-priority"),
    })
}

fn exchange(exchange: &Exchange) -> Value {
    json!({
        "name": exchange.name,
        "type": exchange.kind,
        "arguments": or_null(&exchange.arguments),
        "durable": exchange.durable,
        "passive": exchange.passive,
        "auto_delete": exchange.auto_delete,
        "delivery_mode": null,
        "no_declare": exchange.no_declare,
    })
}

fn or_null(arguments: &Map<String, Value>) -> Value {
    if arguments.is_empty() { Value::Null } else { Value::Object(arguments.clone()) }
}
