//! Connections to the server, and what it tells us unasked (RESP3).
//!
//! Commands and wake-ups share one connection. What is published comes over another: the server closes a
//! connection that subscribes when an answer to it exceeds `client-output-buffer-limit pubsub`, 32 MiB by
//! default, which a few large messages do.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, Pipeline, PushInfo, PushKind};
use redis::{RedisError, Script, ServerErrorKind, ToRedisArgs, Value};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::options::Options;
use crate::error::BrokerError;

pub(crate) static TURN: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lua/turn.lua")));
pub(crate) static BEAT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lua/beat.lua")));
pub(crate) static RESTORE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lua/restore.lua")));
pub(crate) static MOVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lua/move.lua")));
pub(crate) static BURY: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lua/bury.lua")));
pub(crate) static REMEMBER: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("lua/remember.lua")));
pub(crate) static BIND: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lua/bind.lua")));

pub(crate) static REGISTER: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("lua/register.lua")));

/// Without a word of the user's: an answer later than this means that nobody is there. Above any pause that a
/// healthy server makes, below the time after which others take what we hold.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Broadcasts that may wait while the session is busy. Those beyond are dropped, as pub/sub promises no more.
const BROADCAST_CAPACITY: usize = 1024;

/// A live connection. Clones share it; it closes with the last of them.
#[derive(Clone)]
pub(crate) struct Link {
    connection: MultiplexedConnection,
    address: Arc<str>,
}

/// What the server sends unasked.
pub(crate) struct Pushes {
    /// A key that we watch was changed.
    pub(crate) wake: Arc<Notify>,
    /// Channel pattern and payload of what was published.
    pub(crate) broadcasts: mpsc::Receiver<(String, Bytes)>,
    /// The connection is gone.
    pub(crate) lost: CancellationToken,
}

/// Opens the connections of one session. They share one fate: the loss of one is the loss of all.
pub(crate) struct Dialer {
    client: redis::Client,
    address: Arc<str>,
    config: AsyncConnectionConfig,
    client_name: Option<String>,
}

impl Dialer {
    pub(crate) fn new(client: &redis::Client, address: Arc<str>, options: &Options) -> (Self, Pushes) {
        let (sender, broadcasts) = mpsc::channel(BROADCAST_CAPACITY);
        let pushes = Pushes { wake: Arc::default(), broadcasts, lost: CancellationToken::new() };
        let (wake, lost) = (Arc::clone(&pushes.wake), pushes.lost.clone());
        let socket = &options.socket;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(socket.connect_timeout.unwrap_or(CONNECT_TIMEOUT)))
            .set_response_timeout(Some(socket.timeout.unwrap_or(ANSWER_TIMEOUT)))
            .set_push_sender(move |push: PushInfo| -> Result<(), redis::aio::SendError> {
                match push.kind {
                    PushKind::Invalidate => wake.notify_one(),
                    PushKind::Disconnection => lost.cancel(),
                    PushKind::PMessage => {
                        if let Some(broadcast) = broadcast(push.data)
                            && sender.try_send(broadcast).is_err()
                        {
                            tracing::warn!(target: "celeriac.redis", "A broadcast was dropped: too many at once.");
                        }
                    }
                    _ => {}
                }
                Ok(())
            });
        let dialer =
            Self { client: client.clone(), address, config, client_name: socket.client_name.clone() };
        (dialer, pushes)
    }

    pub(crate) async fn connect(&self) -> Result<Link, BrokerError> {
        let connection = self
            .client
            .get_multiplexed_async_connection_with_config(&self.config)
            .await
            .map_err(|error| broker_error(&self.address, &error))?;
        let link = Link { connection, address: Arc::clone(&self.address) };
        if let Some(name) = &self.client_name {
            link.query::<Value>(redis::cmd("CLIENT").arg("SETNAME").arg(name)).await?;
        }
        Ok(link)
    }
}

impl Link {
    pub(crate) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, BrokerError> {
        let mut connection = self.connection.clone();
        command.query_async(&mut connection).await.map_err(|error| self.error(&error))
    }

    pub(crate) async fn pipe<T: FromRedisValue>(&self, pipeline: &Pipeline) -> Result<T, BrokerError> {
        let mut connection = self.connection.clone();
        pipeline.query_async(&mut connection).await.map_err(|error| self.error(&error))
    }

    /// Runs a script, loading it where the server lacks it. It runs once: NOSCRIPT means that it did not run.
    pub(crate) async fn eval<T: FromRedisValue>(
        &self,
        script: &Script,
        call: &Call,
    ) -> Result<T, BrokerError> {
        let command = call.command(script);
        let mut connection = self.connection.clone();
        let answer = match command.query_async(&mut connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let load = script.prepare_invoke();
                match load.load_async(&mut connection).await {
                    Ok(_) => command.query_async(&mut connection).await,
                    Err(error) => Err(error),
                }
            }
            answer => answer,
        };
        answer.map_err(|error| self.error(&error))
    }

    /// Makes [`Link::watch`] possible. False: the server cannot.
    pub(crate) async fn track(&self) -> bool {
        let mut connection = self.connection.clone();
        // Only what is asked for: scripts read keys that change all the time.
        let mut on = redis::cmd("CLIENT");
        on.arg("TRACKING").arg("ON").arg("OPTIN").exec_async(&mut connection).await.is_ok()
    }

    /// How many of these keys exist, and a wake-up when one of them is changed.
    pub(crate) async fn watch<'a>(
        &self,
        keys: impl Iterator<Item = &'a String>,
    ) -> Result<usize, BrokerError> {
        let mut look = redis::cmd("EXISTS");
        for key in keys {
            look.arg(key);
        }
        if look.args_iter().len() < 2 {
            return Ok(0);
        }
        let mut pipeline = redis::pipe();
        pipeline.cmd("CLIENT").arg("CACHING").arg("YES").ignore().add_command(look);
        self.pipe::<(usize,)>(&pipeline).await.map(|(count,)| count)
    }

    pub(crate) async fn subscribe(&self, channel: &str) -> Result<(), BrokerError> {
        self.connection.clone().psubscribe(channel).await.map_err(|error| self.error(&error))
    }

    pub(crate) async fn unsubscribe(&self, channel: &str) -> Result<(), BrokerError> {
        self.connection.clone().punsubscribe(channel).await.map_err(|error| self.error(&error))
    }

    /// The connection as it is to be reported when it is gone.
    pub(crate) fn gone(&self, reason: &str) -> BrokerError {
        BrokerError::Connection { address: self.address.to_string(), reason: reason.to_owned() }
    }

    fn error(&self, error: &RedisError) -> BrokerError {
        broker_error(&self.address, error)
    }
}

/// Keys and arguments of a script.
#[derive(Default)]
pub(crate) struct Call {
    keys: Vec<String>,
    arguments: Vec<Vec<u8>>,
}

impl Call {
    pub(crate) fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self { keys: keys.into_iter().map(str::to_owned).collect(), arguments: Vec::new() }
    }

    pub(crate) fn key(&mut self, key: String) {
        self.keys.push(key);
    }

    pub(crate) fn arg(&mut self, argument: impl ToRedisArgs) -> &mut Self {
        argument.write_redis_args(&mut self.arguments);
        self
    }

    fn command(&self, script: &Script) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(script.get_hash()).arg(self.keys.len()).arg(&self.keys).arg(&self.arguments);
        command
    }
}

fn broadcast(data: Vec<Value>) -> Option<(String, Bytes)> {
    match <[Value; 3]>::try_from(data) {
        Ok([Value::BulkString(pattern), _, Value::BulkString(payload)]) => {
            Some((String::from_utf8(pattern).ok()?, Bytes::from(payload)))
        }
        _ => None,
    }
}

/// Whether trying again may help is decided here, and nowhere else for this broker.
pub(crate) fn broker_error(address: &str, error: &RedisError) -> BrokerError {
    let (address, reason) = (address.to_owned(), reason(error));
    if is_final(error) {
        BrokerError::Refused { address, reason }
    } else {
        BrokerError::Connection { address, reason }
    }
}

/// Whether the server will say the same the next time.
pub(crate) fn is_final(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::AuthenticationFailed | ErrorKind::RESP3NotSupported | ErrorKind::InvalidClientConfig => {
            true
        }
        ErrorKind::Server(ServerErrorKind::NoPerm | ServerErrorKind::CrossSlot | ServerErrorKind::Moved) => {
            true
        }
        _ => {
            let detail = error.detail().unwrap_or_default();
            matches!(error.code(), Some("WRONGPASS" | "NOAUTH" | "WRONGTYPE"))
                || detail.contains("DB index is out of range")
                || detail.contains("invalid DB index")
                || detail.contains("invalid password")
        }
    }
}

/// One sentence for the user.
pub(crate) fn reason(error: &RedisError) -> String {
    match error.kind() {
        ErrorKind::RESP3NotSupported => {
            "the server does not speak RESP3; Redis 6.2 or later is needed".to_owned()
        }
        ErrorKind::Server(ServerErrorKind::CrossSlot | ServerErrorKind::Moved) => {
            format!("{error}: Redis Cluster cannot be a broker; use a single server")
        }
        _ => error.to_string(),
    }
}
