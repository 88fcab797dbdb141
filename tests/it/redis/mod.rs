//! What only Redis has: records and leases in kombu's keys, scripts, the other end written in Python.

mod addresses;
mod layout;
mod leases;
mod recovery;
mod remember;
mod results;
mod server;

use std::collections::HashSet;
use std::sync::Arc;

use celeriac::broker::topology::Queue;
use celeriac::broker::{Broker, Consume, Control};
use redis::AsyncTypedCommands;
use redis::aio::MultiplexedConnection;
use serde_json::Value;

use crate::broker::{envelope, message, redis as conformance};
use crate::support::redis::RedisServer;

/// What Python has to import to be the other end.
const MODULES: &str = "celery, redis";

/// A server, and a connection of the test's own.
struct Stage {
    server: RedisServer,
    redis: MultiplexedConnection,
}

impl Stage {
    async fn start() -> Option<Self> {
        let server = RedisServer::start()?;
        let redis = conformance::connection(&server.url()).await;
        Some(Self { server, redis })
    }

    fn broker(&self, options: Value) -> Arc<dyn Broker> {
        conformance::broker(&self.server.url(), options)
    }

    /// Sends messages with these ids, as a producer does.
    async fn send(&mut self, queue: &str, ids: &[&str]) {
        for id in ids {
            let item = envelope(queue, &message(id)).to_string();
            self.redis.lpush(queue, item).await.unwrap();
        }
    }

    async fn waiting(&mut self, queue: &str) -> usize {
        self.redis.llen(queue).await.unwrap()
    }

    async fn unacked(&mut self) -> Vec<(String, f64)> {
        self.redis.zrange_withscores("unacked_index", 0, -1).await.unwrap()
    }

    /// Cuts every connection but the test's own.
    async fn cut(&mut self) {
        let mut kill = redis::cmd("CLIENT");
        kill.arg("KILL")
            .arg("TYPE")
            .arg("normal")
            .arg("SKIPME")
            .arg("yes")
            .exec_async(&mut self.redis)
            .await
            .unwrap();
        let mut kill = redis::cmd("CLIENT");
        kill.arg("KILL")
            .arg("TYPE")
            .arg("pubsub")
            .arg("SKIPME")
            .arg("yes")
            .exec_async(&mut self.redis)
            .await
            .unwrap();
    }
}

fn consume(queues: &[&str], prefetch: u32) -> Consume {
    Consume {
        node: "celery@tests".to_owned(),
        queues: queues.iter().map(|name| Queue::named(name)).collect(),
        prefetch,
        paused: false,
        control: None,
        held: HashSet::new(),
    }
}

/// Remote control as Celery configures it.
fn control() -> Control {
    Control {
        exchange: "celery".to_owned(),
        queue_ttl: Some(300.0),
        queue_expires: Some(10.0),
        queue_exclusive: false,
        serializer: "json".to_owned(),
        queue_durable: false,
    }
}
