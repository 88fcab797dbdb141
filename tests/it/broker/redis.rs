//! The suite on `redis://`.

use std::sync::Arc;

use celeriac::broker::{Broker, BrokerConfig, by_url};
use celeriac::protocol::Message;
use redis::AsyncTypedCommands;
use redis::aio::MultiplexedConnection;

use super::{GARBAGE, Harness, envelope};
use crate::support::redis::RedisServer;

/// A namespace is a server of its own.
pub(crate) struct RedisHarness {
    server: RedisServer,
    connection: MultiplexedConnection,
}

/// A configuration with these transport options.
pub(crate) fn config(options: serde_json::Value) -> BrokerConfig {
    serde_json::from_value(serde_json::json!({
        "urls": [], "transport_options": options, "retry": true, "retry_on_startup": true,
    }))
    .unwrap()
}

/// A broker at this address.
pub(crate) fn broker(url: &str, options: serde_json::Value) -> Arc<dyn Broker> {
    by_url(url, &config(options)).unwrap().expect("Redis is spoken natively")
}

/// A connection of the test's own.
pub(crate) async fn connection(url: &str) -> MultiplexedConnection {
    redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap()
}

impl Harness for RedisHarness {
    async fn start() -> Option<Self> {
        let server = RedisServer::start()?;
        let connection = connection(&server.url()).await;
        Some(Self { server, connection })
    }

    fn broker(&self) -> Arc<dyn Broker> {
        broker(&self.server.url(), serde_json::json!({}))
    }

    fn name(&self, base: &str) -> String {
        base.to_owned()
    }

    async fn publish(&self, queue: &str, message: &Message) {
        self.connection.clone().lpush(queue, envelope(queue, message).to_string()).await.unwrap();
    }

    async fn publish_garbage(&self, queue: &str) {
        for item in GARBAGE {
            self.connection.clone().lpush(queue, *item).await.unwrap();
        }
    }

    async fn waiting(&self, queue: &str) -> usize {
        self.connection.clone().llen(queue).await.unwrap()
    }

    async fn unsettled(&self) -> Option<usize> {
        let hash = self.connection.clone().hlen("unacked").await.unwrap();
        let index = self.connection.clone().zcard("unacked_index").await.unwrap();
        assert_eq!(hash, index, "records and index differ");
        Some(hash)
    }

    fn kill_server(&mut self) -> bool {
        self.server.kill();
        true
    }
}
