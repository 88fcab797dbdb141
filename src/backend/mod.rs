//! What a result backend is. The supervisor writes what children and native tasks hand it, in batches.
//!
//! The meta document is encoded where the task ran (by Celery's own backend object in a Python child, by
//! [`crate::protocol::result`] for native tasks); here it is bytes with an id, a state and a time to live.

pub mod disabled;
pub mod document;
pub mod file;
pub mod memory;
pub mod redis;
pub mod rpc;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;

use crate::broker::BrokerConfig;
use crate::error::BackendError;

/// One result to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Task id.
    pub task_id: String,
    /// State: `SUCCESS`, `FAILURE`, `STARTED`, `RETRY`, `REVOKED` or a custom one.
    pub state: String,
    /// The encoded meta document.
    pub document: Bytes,
    /// Where the document goes: the key (redis, file) or the reply queue (rpc). Empty: derived from the id.
    pub key: String,
    /// Kept this long; none: for ever.
    pub expires: Option<Duration>,
    /// MIME type of the document; rpc puts it on the message.
    pub content_type: String,
    /// Encoding of the document.
    pub content_encoding: String,
}

impl Record {
    /// Where the document goes in a key/value store.
    pub fn key(&self) -> Cow<'_, str> {
        if self.key.is_empty() { Cow::Owned(key_of(&self.task_id)) } else { Cow::Borrowed(&self.key) }
    }
}

/// A member of a chord to be counted: keys and arguments of the script that counts it (`redis/chord.lua`).
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its keys.
    pub keys: Vec<Bytes>,
    /// Its arguments.
    pub arguments: Vec<Bytes>,
}

/// What the script answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Members whose results are there; -1 when the body was sent before.
    pub ready: i64,
    /// Members that were added to the chord after it was sent.
    pub added: Option<i64>,
    /// Members that it was sent with; none when nobody knows of the chord.
    pub size: Option<i64>,
    /// Whether whoever asked is to send the body.
    pub sends: bool,
}

/// Celery's key of a task's result, without any prefix of the configuration.
pub fn key_of(task_id: &str) -> String {
    format!("celery-task-meta-{task_id}")
}

/// A kind of backend at one address.
#[async_trait]
pub trait ResultBackend: Send + Sync {
    /// The address, password masked.
    fn address(&self) -> String;

    /// Writes results in this order. A stored `SUCCESS` is never overwritten (Celery: the first SUCCESS wins).
    /// The answer holds one entry a record; a retryable error means none of the failed ones was written.
    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>>;

    /// Counts members of chords; one answer a member, as for [`ResultBackend::store`]. May be asked twice.
    async fn count(&self, parts: &[Part]) -> Vec<Result<Counted, BackendError>> {
        let refused = || BackendError::Refused {
            address: self.address(),
            what: "a member of a chord".to_owned(),
            reason: "chords are not counted here".to_owned(),
        };
        parts.iter().map(|_| Err(refused())).collect()
    }

    /// The stored document of a task, if there is one. Not all backends can (rpc cannot).
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    async fn get(&self, task_id: &str) -> Result<Option<Bytes>, BackendError>;
}

/// What the configuration says of the backend.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct BackendConfig {
    /// `result_backend`; empty: disabled.
    #[serde(default)]
    pub url: String,
    /// Whether the supervisor writes: decided by the ladder (python/celeriac/ladder.py).
    #[serde(default)]
    pub native: bool,
    /// `result_backend_transport_options`.
    #[serde(default)]
    pub transport_options: serde_json::Map<String, serde_json::Value>,
    /// `result_expires`, seconds; none: never.
    #[serde(default)]
    pub expires: Option<f64>,
    /// `redis_backend_use_ssl`.
    #[serde(default)]
    pub use_ssl: serde_json::Value,
    /// `result_persistent` (rpc).
    #[serde(default)]
    pub persistent: bool,
}

/// The backend for an address, where it is spoken natively. `rpc://` goes over the broker.
///
/// # Errors
/// When the scheme is ours and the address is wrong.
pub fn by_url(
    config: &BackendConfig,
    broker: &BrokerConfig,
) -> Result<Option<Arc<dyn ResultBackend>>, BackendError> {
    if config.url.is_empty() {
        return Ok(Some(Arc::new(disabled::DisabledBackend)));
    }
    match config.url.split_once(':').map_or(config.url.as_str(), |(scheme, _)| scheme) {
        "disabled" => Ok(Some(Arc::new(disabled::DisabledBackend))),
        "file" => Ok(Some(Arc::new(file::FileBackend::open(&config.url)?))),
        "memory" => Ok(Some(Arc::new(memory::MemoryBackend::open(&config.url)))),
        "rpc" => Ok(rpc::Rpc::new(config, broker)?.map(|rpc| Arc::new(rpc) as Arc<dyn ResultBackend>)),
        _ => Ok(redis::RedisBackend::new(config)?.map(|redis| Arc::new(redis) as Arc<dyn ResultBackend>)),
    }
}
