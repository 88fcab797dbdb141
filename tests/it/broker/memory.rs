//! The suite on `memory://`.

use std::sync::Arc;

use celeriac::broker::Broker;
use celeriac::broker::memory::MemoryBroker;
use celeriac::protocol::Message;

use super::Harness;
use crate::support::unique;

/// A namespace is a broker of its own name.
pub(crate) struct MemoryHarness {
    url: String,
    handle: MemoryBroker,
}

impl Harness for MemoryHarness {
    async fn start() -> Option<Self> {
        let url = format!("memory://{}", unique("suite"));
        Some(Self { handle: MemoryBroker::open(&url), url })
    }

    fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(MemoryBroker::open(&self.url))
    }

    fn name(&self, base: &str) -> String {
        base.to_owned()
    }

    async fn publish(&self, queue: &str, message: &Message) {
        self.handle.publish(queue, message.clone());
    }

    async fn publish_garbage(&self, queue: &str) {
        // Nothing but messages fits in; one without any sense is the worst there is.
        let nonsense = Message {
            content_type: None,
            content_encoding: None,
            headers: celeriac::protocol::Json(bytes::Bytes::from_static(b"not JSON")),
            properties: celeriac::protocol::Json(bytes::Bytes::from_static(b"[")),
            body: bytes::Bytes::new(),
        };
        self.handle.publish(queue, nonsense);
    }

    async fn waiting(&self, queue: &str) -> usize {
        self.handle.waiting(queue)
    }

    async fn unsettled(&self) -> Option<usize> {
        Some(self.handle.unsettled())
    }
}
