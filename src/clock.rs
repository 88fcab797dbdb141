//! The one source of wall time, which goes only on the wire; deadlines use `tokio::time::Instant`.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// Seconds since the epoch, as Python's `time.time()`.
#[expect(clippy::disallowed_methods, reason = "the one place that asks")]
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Until then; for ever without a time.
pub(crate) async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}
