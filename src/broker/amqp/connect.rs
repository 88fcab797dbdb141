//! Makes connections.
//!
//! lapin gives every connection an OS thread (`lapin-io-loop`) that reads and writes its stream, and spawns its
//! heartbeat and its bookkeeping on the tokio runtime that we give it; a current-thread runtime does, as long
//! as it is driven. The thread ends with the stream, and the stream ends at the latest when the [`Link`] is
//! dropped: it has one owner, and nothing of a connection outlives it.

use std::sync::{Mutex, PoisonError};

use async_rs::Runtime;
use lapin::tcp::AsyncTcpStream;
use lapin::types::AMQPValue;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use lapin::{Channel, Connection, ConnectionProperties};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::address::{Address, Login};
use super::fault::Fault;
use super::transport::{Greeting, Kit, Wire};

/// A connection with its stream.
pub(super) struct Link {
    pub(super) connection: Connection,
    greeting: Greeting,
    /// Ends the stream.
    _cut: DropGuard,
}

impl Link {
    /// Connects and logs in. `name` is what operators see in the broker's list of connections.
    pub(super) async fn open(address: &Address, name: &str) -> Result<Self, Fault> {
        let cut = CancellationToken::new();
        let guard = cut.clone().drop_guard();
        let opening = async {
            let (wire, greeting) = Wire::dial(address, cut).await.map_err(Fault::Io)?;
            let wire = Mutex::new(Some(wire));
            // Called on lapin's thread, once: it makes no second attempt.
            let connector = async move |_: AMQPUri, _: Runtime<Kit>| {
                let wire = wire.lock().unwrap_or_else(PoisonError::into_inner).take();
                let wire = wire.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))?;
                Ok(AsyncTcpStream::Plain(wire))
            };
            let runtime = Runtime::new(Kit::current());
            let connection =
                Connection::connector(uri(address), runtime, connector, properties(address, name)).await?;
            Ok((connection, greeting))
        };
        match tokio::time::timeout(address.timeout, opening).await {
            Ok(Ok((connection, greeting))) => Ok(Self { connection, greeting, _cut: guard }),
            Ok(Err(fault)) => Err(fault),
            Err(_) => Err(Fault::Silent("the request to connect")),
        }
    }

    /// A new channel.
    pub(super) async fn channel(&self) -> Result<Channel, Fault> {
        Ok(self.connection.create_channel().await?)
    }

    /// Whether `basic.qos` with `global` counts for the whole channel: kombu's rule. RabbitMQ before 3.3 and
    /// others go by the specification, 4.0 has given it up.
    pub(super) fn counts_per_channel(&self) -> bool {
        let Some(table) = self.greeting.get() else { return false };
        let text = |name: &str| match table.inner().get(name) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            _ => String::new(),
        };
        text("product") == "RabbitMQ"
            && version(&text("version")).is_some_and(|version| ((3, 3)..(4, 0)).contains(&version))
    }
}

/// Major and minor.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

fn uri(address: &Address) -> AMQPUri {
    AMQPUri {
        // TLS is ours; lapin sees a plain stream.
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo { username: address.user.clone(), password: address.password.clone() },
            host: address.host.clone(),
            port: address.port,
        },
        vhost: address.vhost.clone(),
        query: AMQPQueryString {
            frame_max: None,
            channel_max: None,
            heartbeat: u16::try_from(address.heartbeat.as_secs()).ok().filter(|seconds| *seconds > 0),
            connection_timeout: None,
            auth_mechanism: Some(match address.login {
                Login::Plain => SASLMechanism::Plain,
                Login::AmqPlain => SASLMechanism::AMQPlain,
                Login::External => SASLMechanism::External,
            }),
        },
    }
}

fn properties(address: &Address, name: &str) -> ConnectionProperties {
    let mut properties = ConnectionProperties::default()
        .with_connection_name(name.into())
        .with_client_property("product".into(), "celeriac".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    for (name, value) in &address.client_properties {
        if let Ok(name) = super::fault::short(name) {
            properties = properties.with_client_property(name, value.as_str().into());
        }
    }
    properties
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let per_channel =
            |text: &str| version(text).is_some_and(|version| ((3, 3)..(4, 0)).contains(&version));
        assert!(per_channel("3.10.8") && per_channel("3.3.0") && per_channel("3.13.7-rc.1"));
        assert!(!per_channel("3.2.9") && !per_channel("4.0.0-beta.1") && !per_channel("4.1.2"));
        assert!(!per_channel("") && !per_channel("unknown"));
    }
}
