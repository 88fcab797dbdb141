//! `broker_transport_options`: kombu's names and defaults.

use std::time::Duration;

use serde_json::{Map, Value};

use super::address::Socket;

/// The options that change what travels or when.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Options {
    /// How long a message may be unacknowledged before anybody may restore it.
    pub(crate) visibility_timeout: f64,
    /// Priorities that have a list of their own, rising.
    pub(crate) priority_steps: Vec<i64>,
    /// Between a queue's name and its priority, and between the parts of a binding.
    pub(crate) sep: String,
    pub(crate) order: Order,
    /// Before every key and channel.
    pub(crate) global_keyprefix: String,
    pub(crate) unacked_key: String,
    pub(crate) unacked_index_key: String,
    /// Before the exchange in a channel's name; `{db}` stands for the database.
    pub(crate) fanout_prefix: String,
    /// Whether a routing key is part of the channel's name.
    pub(crate) fanout_patterns: bool,
    /// Whether published bodies are base64 (or plain text).
    pub(crate) base64: bool,
    /// Where messages without a route go.
    pub(crate) deadletter_queue: Option<String>,
    pub(crate) socket: Socket,
}

/// In which order queues of one priority are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// In turns.
    RoundRobin,
    /// By name.
    Sorted,
    /// As configured.
    Priority,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            visibility_timeout: 3600.0,
            priority_steps: vec![0, 3, 6, 9],
            sep: "\u{6}\u{16}".to_owned(),
            order: Order::RoundRobin,
            global_keyprefix: String::new(),
            unacked_key: "unacked".to_owned(),
            unacked_index_key: "unacked_index".to_owned(),
            fanout_prefix: "/{db}.".to_owned(),
            fanout_patterns: true,
            base64: true,
            deadletter_queue: None,
            socket: Socket { keepalive: true, ..Socket::default() },
        }
    }
}

impl Options {
    /// Reads the options; `query` is the address's and wins, as in kombu. The reason on failure is for the user.
    pub(crate) fn read(options: &Map<String, Value>, query: &Map<String, Value>) -> Result<Self, String> {
        let mut read = Self::default();
        for (name, value) in options.iter().chain(query) {
            if !value.is_null() {
                read.option(name, value)?;
            }
        }
        Ok(read)
    }

    fn option(&mut self, name: &str, value: &Value) -> Result<(), String> {
        let wrong = |expected: &str| format!("transport option {name} is {value}, not {expected}");
        let text = || value.as_str().map(str::to_owned).ok_or_else(|| wrong("a text"));
        let number = || {
            let number = value.as_f64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
            number.filter(|number| number.is_finite()).ok_or_else(|| wrong("a number"))
        };
        let wait = || seconds(number()?).ok_or_else(|| wrong("a number of seconds above 0"));
        match name {
            "visibility_timeout" => {
                self.visibility_timeout = number()?;
                if self.visibility_timeout <= 0.0 {
                    return Err(wrong("a number of seconds above 0"));
                }
            }
            "priority_steps" => {
                let steps: Option<Vec<i64>> =
                    value.as_array().map(|steps| steps.iter().filter_map(Value::as_i64).collect());
                self.priority_steps = steps
                    .filter(|steps| !steps.is_empty() && steps.is_sorted())
                    .ok_or_else(|| wrong("a rising list of numbers"))?;
            }
            "sep" => self.sep = text()?,
            "queue_order_strategy" => {
                self.order = match value.as_str() {
                    Some("round_robin") => Order::RoundRobin,
                    Some("sorted") => Order::Sorted,
                    Some("priority") => Order::Priority,
                    _ => return Err(wrong("one of round_robin, sorted, priority")),
                }
            }
            "global_keyprefix" => self.global_keyprefix = text()?,
            "unacked_key" => self.unacked_key = text()?,
            "unacked_index_key" => self.unacked_index_key = text()?,
            "fanout_prefix" => match value {
                Value::Bool(true) => {}
                Value::Bool(false) => self.fanout_prefix.clear(),
                _ => self.fanout_prefix = text()?,
            },
            "fanout_patterns" => self.fanout_patterns = truth(value),
            "body_encoding" => {
                self.base64 = match value.as_str() {
                    Some("base64") => true,
                    Some(other) if other.eq_ignore_ascii_case("utf-8") => false,
                    _ => return Err(wrong("base64 or utf-8")),
                }
            }
            "deadletter_queue" => self.deadletter_queue = Some(text()?),
            "socket_timeout" => self.socket.timeout = Some(wait()?),
            "socket_connect_timeout" => self.socket.connect_timeout = Some(wait()?),
            "socket_keepalive" => self.socket.keepalive = truth(value),
            "client_name" => self.socket.client_name = Some(text()?),
            "ack_emulation" if !truth(value) => {
                return Err(
                    "ack_emulation=False would lose what a worker holds when it dies; celeriac does \
                            not offer it: remove it from broker_transport_options"
                        .to_owned(),
                );
            }
            "credential_provider" => {
                return Err("credential_provider is Python code, which the Redis broker of celeriac cannot \
                            call: put user name and password into broker_url"
                    .to_owned());
            }
            // Everything else tunes kombu's own machinery.
            _ => {}
        }
        Ok(())
    }
}

/// As Python judges it.
fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
    }
}

fn seconds(number: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number).ok().filter(|wait| !wait.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(options: Value) -> Result<Options, String> {
        Options::read(options.as_object().unwrap(), &Map::new())
    }

    #[test]
    fn no_options_are_kombus_defaults_and_unknown_ones_change_nothing() {
        assert_eq!(read(json!({})).unwrap(), Options::default());
        let harmless = json!({"max_connections": 3, "unacked_restore_interval": 1, "polling_interval": 2});
        assert_eq!(read(harmless).unwrap(), Options::default());
    }

    #[test]
    fn options_are_read_by_kombus_names() {
        let options = read(json!({
            "visibility_timeout": 5, "priority_steps": [0, 5], "sep": ":", "queue_order_strategy": "sorted",
            "global_keyprefix": "app_", "fanout_prefix": false, "body_encoding": "utf-8",
            "socket_timeout": 2.5, "client_name": "w1",
        }))
        .unwrap();
        assert_eq!((options.visibility_timeout, options.priority_steps), (5.0, vec![0, 5]));
        assert_eq!((options.sep.as_str(), options.order), (":", Order::Sorted));
        assert_eq!((options.global_keyprefix.as_str(), options.fanout_prefix.as_str()), ("app_", ""));
        assert!(!options.base64);
        assert_eq!(options.socket.timeout, Some(Duration::from_millis(2500)));
        assert_eq!(options.socket.client_name.as_deref(), Some("w1"));
    }

    #[test]
    fn an_option_that_cannot_be_honoured_is_refused_by_name() {
        for (options, name) in [
            (json!({"ack_emulation": false}), "ack_emulation"),
            (json!({"credential_provider": "a.b:C"}), "credential_provider"),
            (json!({"queue_order_strategy": "mine"}), "queue_order_strategy"),
            (json!({"visibility_timeout": 0}), "visibility_timeout"),
            (json!({"priority_steps": []}), "priority_steps"),
            (json!({"socket_timeout": -1}), "socket_timeout"),
        ] {
            assert!(read(options).unwrap_err().contains(name), "{name}");
        }
    }
}
