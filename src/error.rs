//! The crate's error: one variant an area, each saying who should act, with an exit code.

use std::time::Duration;

/// What a caller of the crate can see fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting, option or address is wrong. The user must change it.
    #[error("{0}")]
    Config(String),
    /// The broker cannot be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The result backend cannot be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The pool cannot start or keep its children.
    #[error("{0}")]
    Pool(String),
    /// Something of ours is wrong.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// The exit status of a worker that ends with this error, as Celery's.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Config(_) => 2,
            Self::Broker(_) | Self::Backend(_) | Self::Pool(_) | Self::Internal(_) => 1,
        }
    }
}

/// How a broker fails. `address` is masked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BrokerError {
    /// The connection could not be made or was lost. Trying again may help.
    #[error("{address}: {reason}")]
    Connection {
        /// The broker's address, password masked.
        address: String,
        /// What the client library or the server said.
        reason: String,
    },
    /// The server answered and refused (credentials, a conflicting declaration). Trying again does not help.
    #[error("{address} refused: {reason}")]
    Refused {
        /// The broker's address, password masked.
        address: String,
        /// What the server said.
        reason: String,
    },
    /// The address or an option of it is wrong.
    #[error("broker address {address}: {reason}; check broker_url")]
    Address {
        /// The broker's address, password masked.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl BrokerError {
    /// What happened, without the address, for lines that name it themselves.
    pub fn reason(&self) -> &str {
        match self {
            Self::Connection { reason, .. } | Self::Refused { reason, .. } | Self::Address { reason, .. } => {
                reason
            }
        }
    }

    /// Whether connecting again may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Connection { .. })
    }
}

/// How a result backend fails. `address` is masked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The server cannot be reached; the write is kept and tried again.
    #[error("result backend {address}: {reason}")]
    Connection {
        /// The backend's address, password masked.
        address: String,
        /// What the client library or the server said.
        reason: String,
    },
    /// The server refused this write; trying again does not help.
    #[error("result backend {address} refused {what}: {reason}")]
    Refused {
        /// The backend's address, password masked.
        address: String,
        /// What was to be written.
        what: String,
        /// What the server said.
        reason: String,
    },
    /// The address is wrong.
    #[error("result backend address {address}: {reason}; check result_backend")]
    Address {
        /// The backend's address, password masked.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl BackendError {
    /// Whether trying again may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Connection { .. })
    }
}

/// An address with its password replaced by `**`, as Celery prints it. Every address that is shown
/// goes through here.
pub fn mask(address: &str) -> String {
    address.split(';').map(mask_one).collect::<Vec<_>>().join(";")
}

fn mask_one(address: &str) -> String {
    let Some((scheme, rest)) = address.split_once("://") else { return address.to_owned() };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let Some(at) = rest[..end].rfind('@').or_else(|| rest.rfind('@')) else { return address.to_owned() };
    match rest[..at].split_once(':') {
        Some((user, _)) => format!("{scheme}://{user}:**{}", &rest[at..]),
        None => address.to_owned(),
    }
}

/// The wait before the next attempt: 0 for the first, then doubling to `longest`, with full jitter
/// on the upper half so that a fleet does not come back in step.
pub fn back_off(attempt: u32, first: Duration, longest: Duration) -> Duration {
    if attempt == 0 {
        return Duration::ZERO;
    }
    let full = first.saturating_mul(1 << (attempt - 1).min(16)).min(longest);
    full.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_masked_in_every_kind_of_address() {
        for (plain, masked) in [
            ("redis://:secret@host:6379/0", "redis://:**@host:6379/0"),
            ("amqp://user:p/w@host//", "amqp://user:**@host//"),
            ("amqp://guest@host//", "amqp://guest@host//"),
            ("redis://host/0", "redis://host/0"),
            ("amqp://a:b@x//;amqp://c:d@y//", "amqp://a:**@x//;amqp://c:**@y//"),
            (
                "redis+socket://:pw@/run/redis.sock?virtual_host=1",
                "redis+socket://:**@/run/redis.sock?virtual_host=1",
            ),
        ] {
            assert_eq!(mask(plain), masked);
        }
    }

    #[test]
    fn back_off_starts_at_once_and_is_capped() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(5));
        assert_eq!(back_off(0, first, longest), Duration::ZERO);
        for attempt in 1..40 {
            let wait = back_off(attempt, first, longest);
            assert!(wait >= first / 2 && wait <= longest, "{attempt}: {wait:?}");
        }
    }
}
