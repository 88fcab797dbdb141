//! What workers to come must know: one sorted set, a text and the time at which it is forgotten.
//!
//! Read once a session and written when something is revoked; no task ever waits for it. A server whose rules keep us
//! from the key costs a warning and nothing else.

use super::link::{Call, Link, REMEMBER};
use super::shared::Shared;
use crate::broker::Remembrance;
use crate::error::BrokerError;

/// Texts kept by one script, which keeps the server from everybody else.
const BATCH: usize = 1000;

/// Keeps the texts.
pub(super) async fn remember(
    link: &Link,
    shared: &Shared,
    remembrance: &Remembrance,
) -> Result<(), BrokerError> {
    for entries in remembrance.entries.chunks(BATCH) {
        let mut call = Call::new([shared.keys.revoked.as_str()]);
        call.arg(remembrance.most);
        for (text, keep) in entries {
            call.arg(text);
            if keep.is_finite() {
                call.arg(keep.ceil())
            } else {
                call.arg("inf")
            };
        }
        let kept = link.eval::<redis::Value>(&REMEMBER, &call).await.map(drop);
        tolerate(
            kept,
            shared,
            "Revoked tasks are forgotten when all workers stop: the key cannot be written.",
        )?;
    }
    Ok(())
}

/// All that is kept at this time of the server's.
pub(super) async fn recall(link: &Link, shared: &Shared, now: f64) -> Result<Vec<String>, BrokerError> {
    let mut range = redis::cmd("ZRANGEBYSCORE");
    range.arg(&shared.keys.revoked).arg(format!("({now}")).arg("+inf");
    let read = link.query(&range).await;
    tolerate(read, shared, "Tasks revoked before this start are not known: the key cannot be read.")
}

fn tolerate<T: Default>(
    answer: Result<T, BrokerError>,
    shared: &Shared,
    consequence: &str,
) -> Result<T, BrokerError> {
    match answer {
        Err(error) if !error.is_retryable() => {
            tracing::warn!(target: "celeriac.redis", key = shared.keys.revoked, %error, "{consequence}");
            Ok(T::default())
        }
        answer => answer,
    }
}
