//! Results in Redis: the meta document under its key, and the same document published for those who wait.
//!
//! One connection, opened when it is first needed and again when it was lost. Writing a batch is one round trip
//! for most batches; whatever could not be written is answered as retryable, and the caller tries again.

use std::sync::LazyLock;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ErrorKind, ProtocolVersion, RedisError, Script, ServerErrorKind, Value};
use serde_json::Map;
use tokio::sync::Mutex;

use super::{BackendConfig, Counted, Part, Record, ResultBackend};
use crate::broker::redis::address::{Address, Place};
use crate::broker::redis::link::{is_final, reason};
use crate::broker::redis::options::Options;
use crate::error::{BackendError, mask};

static STORE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("store.lua")));
/// Counts a member of a chord. Children that write their results themselves run it, too.
pub const CHORD_SCRIPT: &str = include_str!("chord.lua");
static CHORD: LazyLock<Script> = LazyLock::new(|| Script::new(CHORD_SCRIPT));

/// The longest value that Redis takes.
const LONGEST: usize = 512 * 1024 * 1024;
/// Documents of one script call: while it runs the server serves nobody else.
const BATCH_RECORDS: usize = 64;
const BATCH_BYTES: usize = 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Above any pause of a healthy server, with room for a large document on a slow line.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A Redis server as result backend.
pub struct RedisBackend {
    client: redis::Client,
    config: AsyncConnectionConfig,
    address: String,
    prefix: String,
    connection: Mutex<Option<MultiplexedConnection>>,
}

impl RedisBackend {
    /// A backend at this address, or none when the scheme is another.
    ///
    /// # Errors
    /// [`BackendError::Address`] when the address or an option is wrong.
    pub fn new(config: &BackendConfig) -> Result<Option<Self>, BackendError> {
        let wrong = |reason: String| BackendError::Address { address: mask(&config.url), reason };
        let scheme = config.url.split_once("://").map(|(scheme, _)| scheme);
        if !matches!(scheme, Some("redis" | "rediss" | "redis+socket" | "socket")) {
            return Ok(None);
        }
        let mut address = Address::parse(&config.url).map_err(wrong)?;
        let told = address.use_ssl(&config.use_ssl).map_err(wrong)?;
        if scheme == Some("rediss") && !told && matches!(address.place, Place::Tcp { .. }) {
            let reason =
                "rediss:// needs ssl_cert_reqs=CERT_REQUIRED, CERT_OPTIONAL or CERT_NONE in its query";
            return Err(wrong(reason.to_owned()));
        }
        let mut socket = Options::read(&Map::new(), &address.query).map_err(wrong)?.socket;
        socket.connect_timeout.get_or_insert(CONNECT_TIMEOUT);
        socket.timeout.get_or_insert(ANSWER_TIMEOUT);
        let client = address.client(ProtocolVersion::RESP2, &socket).map_err(wrong)?;
        let prefix = config.transport_options.get("global_keyprefix").and_then(serde_json::Value::as_str);
        let connect = AsyncConnectionConfig::new()
            .set_connection_timeout(socket.connect_timeout)
            .set_response_timeout(socket.timeout);
        Ok(Some(Self {
            client,
            config: connect,
            address: address.masked(),
            prefix: task_prefix(prefix.unwrap_or_default()),
            connection: Mutex::new(None),
        }))
    }

    fn key(&self, record: &Record) -> String {
        if record.key.is_empty() { format!("{}{}", self.prefix, record.task_id) } else { record.key.clone() }
    }

    /// The connection, and whether it is a new one.
    async fn connection(&self) -> Result<(MultiplexedConnection, bool), RedisError> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = &*slot {
            return Ok((connection.clone(), false));
        }
        let connection = self.client.get_multiplexed_async_connection_with_config(&self.config).await?;
        Ok((slot.insert(connection).clone(), true))
    }

    /// Runs a command. What is sent here may be sent twice without harm, so a connection that was found dead
    /// is replaced once.
    async fn query<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, RedisError> {
        loop {
            let (mut connection, new) = self.connection().await?;
            let answer = command.query_async(&mut connection).await;
            match answer {
                Err(error) if error.is_unrecoverable_error() || error.is_timeout() => {
                    *self.connection.lock().await = None;
                    if new || error.is_timeout() {
                        return Err(error);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                    STORE.prepare_invoke().load_async(&mut connection).await?;
                    CHORD.prepare_invoke().load_async(&mut connection).await?;
                }
                answer => return answer,
            }
        }
    }

    async fn store_some(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        let mut command = redis::cmd("EVALSHA");
        command.arg(STORE.get_hash()).arg(records.len());
        for record in records {
            command.arg(self.key(record));
        }
        for record in records {
            let seconds = record.expires.map_or(0, |expires| expires.as_secs());
            command.arg(&record.document[..]).arg(seconds);
        }
        match self.query::<Vec<Value>>(&command).await {
            Ok(answers) if answers.len() == records.len() => records
                .iter()
                .zip(answers)
                .map(|(record, answer)| match answer {
                    Value::Int(_) => Ok(()),
                    Value::BulkString(error) => Err(self.refused(record, &String::from_utf8_lossy(&error))),
                    other => Err(self.refused(record, &format!("{other:?}"))),
                })
                .collect(),
            Ok(answers) => {
                let reason = format!("{} answers to {} results", answers.len(), records.len());
                records.iter().map(|_| Err(self.unreachable(&reason))).collect()
            }
            Err(error) => records.iter().map(|record| Err(self.error(&error, &self.key(record)))).collect(),
        }
    }

    fn refused(&self, record: &Record, reason: &str) -> BackendError {
        // A server that is full, read-only, or cannot save will not be so for ever, and results wait.
        let passing = ["OOM", "READONLY", "MISCONF", "NOREPLICAS", "LOADING", "BUSY", "MASTERDOWN"];
        if passing.iter().any(|code| reason.trim_start_matches('-').starts_with(code)) {
            return self.unreachable(reason);
        }
        BackendError::Refused {
            address: self.address.clone(),
            what: self.key(record),
            reason: reason.to_owned(),
        }
    }

    fn unreachable(&self, reason: &str) -> BackendError {
        BackendError::Connection { address: self.address.clone(), reason: reason.to_owned() }
    }

    fn error(&self, error: &RedisError, what: &str) -> BackendError {
        let (address, reason) = (self.address.clone(), reason(error));
        if is_final(error) {
            BackendError::Refused { address, what: what.to_owned(), reason }
        } else {
            BackendError::Connection { address, reason }
        }
    }
}

/// As Celery: the prefix and an underscore, unless it already ends in something of the kind.
fn task_prefix(prefix: &str) -> String {
    let separator = if prefix.is_empty() || prefix.ends_with([':', '_', '-', '.']) { "" } else { "_" };
    format!("{prefix}{separator}celery-task-meta-")
}

#[async_trait]
impl ResultBackend for RedisBackend {
    fn address(&self) -> String {
        self.address.clone()
    }

    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        let mut answers: Vec<Result<(), BackendError>> = Vec::with_capacity(records.len());
        while answers.len() < records.len() {
            // A later result of a task must not be written before an earlier one that will be tried again.
            if answers.last().is_some_and(|last| last.as_ref().is_err_and(BackendError::is_retryable)) {
                answers.push(Err(self.unreachable("an earlier result could not be stored")));
                continue;
            }
            let rest = &records[answers.len()..];
            let mut bytes = 0;
            let fitting = rest.iter().take(BATCH_RECORDS).take_while(|record| {
                let fits = bytes == 0 || bytes + record.document.len() <= BATCH_BYTES;
                bytes += record.document.len();
                fits && record.document.len() <= LONGEST
            });
            match fitting.count() {
                0 => answers.push(Err(self.refused(&rest[0], "value too large for Redis backend"))),
                count => answers.extend(self.store_some(&rest[..count]).await),
            }
        }
        answers
    }

    async fn count(&self, parts: &[Part]) -> Vec<Result<Counted, BackendError>> {
        // Side by side: the connection takes them in one go.
        let answers = parts.iter().map(|part| async move {
            let mut command = redis::cmd("EVALSHA");
            command.arg(CHORD.get_hash()).arg(part.keys.len());
            for text in part.keys.iter().chain(&part.arguments) {
                command.arg(&text[..]);
            }
            let answer: (i64, Option<i64>, Option<i64>, i64) =
                self.query(&command).await.map_err(|error| self.error(&error, "a member of a chord"))?;
            let (ready, added, size, sends) = answer;
            Ok(Counted { ready, added, size, sends: sends == 1 })
        });
        futures_util::future::join_all(answers).await
    }

    async fn get(&self, task_id: &str) -> Result<Option<Bytes>, BackendError> {
        let key = format!("{}{task_id}", self.prefix);
        let mut command = redis::cmd("GET");
        command.arg(&key);
        let document: Option<Vec<u8>> =
            self.query(&command).await.map_err(|error| self.error(&error, &key))?;
        Ok(document.map(Bytes::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(url: &str) -> Result<Option<RedisBackend>, BackendError> {
        RedisBackend::new(&BackendConfig { url: url.to_owned(), ..BackendConfig::default() })
    }

    #[test]
    fn keys_are_prefixed_as_celery_does() {
        assert_eq!(task_prefix(""), "celery-task-meta-");
        assert_eq!(task_prefix("app"), "app_celery-task-meta-");
        assert_eq!(task_prefix("app:"), "app:celery-task-meta-");
    }

    #[test]
    fn other_schemes_are_not_ours_and_wrong_addresses_are_refused() {
        assert!(backend("db+sqlite:///x").unwrap().is_none());
        assert!(backend("redis://host/1").unwrap().is_some());
        assert!(matches!(backend("redis://host/one"), Err(BackendError::Address { .. })));
        assert!(matches!(backend("rediss://host"), Err(BackendError::Address { .. })));
        assert!(backend("rediss://host?ssl_cert_reqs=none").unwrap().is_some());
    }
}
