//! Makes connections.
//!
//! lapin gives every connection an OS thread (`lapin-io-loop`) that does the socket's reading and writing, and
//! spawns its heartbeat and bookkeeping on the tokio runtime it was connected from; a current-thread runtime
//! does, as long as it is being driven. Dropping the last handle (connection, channels, consumers) closes the
//! connection and ends thread and tasks.

use lapin::ConnectionProperties;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use lapin::{Connection, runtime};

use super::address::{Address, Login};
use super::fault::Fault;

/// A connection, logged in. `name` is what operators see in the broker's list of connections.
pub(super) async fn open(address: &Address, name: &str) -> Result<Connection, Fault> {
    let uri = AMQPUri {
        scheme: if address.tls.is_some() { AMQPScheme::AMQPS } else { AMQPScheme::AMQP },
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
    };
    let properties = ConnectionProperties::default()
        .with_connection_name(name.into())
        .with_client_property("product".into(), "celeriac".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    let connecting = Connection::connect_uri_with_runtime(uri, properties, runtime::default_runtime()?);
    match tokio::time::timeout(address.timeout, connecting).await {
        Ok(connection) => Ok(connection?),
        Err(_) => Err(Fault::Silent("the connection request")),
    }
}
