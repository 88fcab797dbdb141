//! How the client library fails, and which of it connecting again may mend.

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::ShortString;

use super::address::Address;
use crate::error::BrokerError;

/// A failure of one operation.
#[derive(Debug)]
pub(super) enum Fault {
    /// What lapin says.
    Client(lapin::Error),
    /// The stream could not be opened.
    Io(std::io::Error),
    /// A name that does not fit AMQP's 255 bytes.
    TooLong(String),
    /// The broker did not answer in time.
    Silent(&'static str),
    /// The broker cancelled the consumer of this queue, which was deleted or has moved.
    Cancelled(String),
    /// The broker did not take or could not route a message.
    NotTaken(String),
}

impl From<lapin::Error> for Fault {
    fn from(error: lapin::Error) -> Self {
        Self::Client(error)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Client(error) => match error.kind() {
                ErrorKind::ProtocolError(error) => {
                    write!(formatter, "({}) {}", error.get_id(), error.get_message())
                }
                ErrorKind::IOError(error) => write!(formatter, "{error}"),
                _ => write!(formatter, "{error}"),
            },
            Self::Io(error) => write!(formatter, "{error}"),
            Self::TooLong(name) => write!(formatter, "the name {name:?} is longer than AMQP's 255 bytes"),
            Self::Silent(what) => write!(formatter, "no answer to {what}"),
            Self::Cancelled(queue) => {
                write!(formatter, "the broker cancelled the consumer of queue {queue:?}")
            }
            Self::NotTaken(reason) => write!(formatter, "{reason}"),
        }
    }
}

impl Fault {
    /// The error of a session that could not start. A channel error (refused login, conflicting declaration,
    /// missing entity, locked queue) will be the same next time; whatever ends the connection may pass.
    pub(super) fn starting(&self, address: &Address) -> BrokerError {
        match self {
            Self::TooLong(_) => address.refused(self),
            Self::Client(error) => match soft(error) {
                Some(AMQPSoftError::NOTFOUND) if node_down(error) => address.lost(self),
                Some(_) => address.refused(self),
                None => address.lost(self),
            },
            Self::Io(_) | Self::Silent(_) | Self::Cancelled(_) | Self::NotTaken(_) => address.lost(self),
        }
    }

    /// Whether the broker refused this one request and the connection goes on.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            Self::TooLong(_) => true,
            Self::Client(error) => soft(error).is_some(),
            Self::Io(_) | Self::Silent(_) | Self::Cancelled(_) | Self::NotTaken(_) => false,
        }
    }

    /// Whether the request came too late for its channel, which was closed over an earlier one.
    pub(super) fn is_late(&self) -> bool {
        matches!(self, Self::Client(error) if matches!(error.kind(), ErrorKind::InvalidChannelState(..)))
    }

    /// Whether the queue belongs to another connection.
    pub(super) fn is_locked(&self) -> bool {
        matches!(self, Self::Client(error) if soft(error) == Some(AMQPSoftError::RESOURCELOCKED))
    }
}

fn soft(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => Some(soft.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// RabbitMQ says "not found" of a queue whose node is down for the moment; only the text tells.
fn node_down(error: &lapin::Error) -> bool {
    let text = error.to_string();
    text.contains("home node") || text.contains("down or inaccessible")
}

/// A name as AMQP carries it.
pub(super) fn short(name: &str) -> Result<ShortString, Fault> {
    ShortString::try_new(name).map_err(|_| Fault::TooLong(name.to_owned()))
}
