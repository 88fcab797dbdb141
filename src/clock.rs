//! The one source of wall time. Deadlines use `tokio::time::Instant`; this goes only on the wire.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since the epoch, as Python's `time.time()`.
#[expect(clippy::disallowed_methods, reason = "the one place that asks")]
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
