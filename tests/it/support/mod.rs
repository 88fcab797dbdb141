//! Private servers on free ports, temporary folders, waiting with a deadline.

#![allow(dead_code, reason = "each area takes what it needs")]

pub(crate) mod folder;
pub(crate) mod pool;
pub(crate) mod process;
pub(crate) mod python;
pub(crate) mod rabbitmq;
pub(crate) mod redis;

pub(crate) use python::python;

use std::time::Duration;

use tokio::time::Instant;

/// How long anything that is to happen may take. Generous: a loaded machine is no failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(45);

/// Asks again and again until the answer is true; panics with `what` when it never is.
pub(crate) async fn wait_until<F, Answer>(what: &str, mut ask: F)
where
    F: FnMut() -> Answer,
    Answer: Future<Output = bool>,
{
    let deadline = Instant::now() + DEADLINE;
    while !ask().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A name that no other test uses, now or earlier, on a shared server.
pub(crate) fn unique(base: &str) -> String {
    format!("{base}-{}", uuid::Uuid::new_v4().simple())
}
