//! Looks after what others left: messages whose time is up, and what dead workers held. Driven by the findings
//! of each beat; does nothing of its own accord.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::link::Link;
use super::restore::{self, End, Guard};
use super::shared::Shared;
use crate::error::BrokerError;

/// A worker that was silent for so long may be dead: three beats missed, and a half.
pub(crate) const SILENCE: f64 = 7.0;
/// And is dead when it stays silent for so long while we hear the server: after a pause of the server itself
/// everybody is silent, for a beat.
const OBSERVED: Duration = Duration::from_secs(4);
/// The same after an outage that we saw ourselves: others may still be waiting before they connect again, which is
/// half a minute at most.
const ABSENT: Duration = Duration::from_secs(35);
/// Who marked a session dead is to be done with it by then; else it died too, and another goes on.
const BURIAL: f64 = 10.0;
/// Overdue messages listed by one beat; when there are more, the next beat follows at once.
pub(crate) const OVERDUE_LIMIT: usize = 500;

/// What a beat found.
#[derive(Debug)]
pub(crate) struct Findings {
    /// The server's time.
    pub(crate) now: f64,
    /// Fields whose score is below `now - visibility timeout`, oldest first.
    pub(crate) overdue: Vec<String>,
    /// Silent sessions and their scores.
    pub(crate) silent: Vec<(String, String)>,
}

/// The task that acts on findings.
pub(crate) struct Sweeper {
    pub(crate) link: Link,
    pub(crate) shared: Arc<Shared>,
    pub(crate) findings: mpsc::Receiver<Findings>,
    /// The server's time when this worker connected again, if it did.
    pub(crate) came_back: Option<f64>,
    /// Asks for another beat.
    pub(crate) again: Arc<Notify>,
    /// When each silent session was first seen with its score.
    pub(crate) seen: HashMap<String, (String, Instant)>,
}

impl Sweeper {
    /// Runs until the session ends or the connection fails.
    pub(crate) async fn run(mut self) -> Result<(), BrokerError> {
        while let Some(findings) = self.findings.recv().await {
            self.restore(&findings).await?;
            self.bury(findings).await?;
        }
        Ok(())
    }

    async fn restore(&self, findings: &Findings) -> Result<(), BrokerError> {
        if findings.overdue.is_empty() {
            return Ok(());
        }
        let ceiling = findings.now - self.shared.options.visibility_timeout;
        // Pushed newest first, so that the oldest is next in line.
        let fields: Vec<String> = findings.overdue.iter().rev().cloned().collect();
        let count =
            restore::put_back(&self.link, &self.shared, &fields, End::Head, Guard::Overdue(ceiling)).await?;
        if count > 0 {
            tracing::info!(target: "celeriac.redis", count, "Restored messages whose time was up.");
        }
        if findings.overdue.len() >= OVERDUE_LIMIT {
            self.again.notify_one();
        }
        Ok(())
    }

    async fn bury(&mut self, findings: Findings) -> Result<(), BrokerError> {
        let mut seen = std::mem::take(&mut self.seen);
        for (owner, score) in findings.silent {
            let number: f64 = score.parse().unwrap_or(0.0);
            if number < 0.0 && findings.now + number < BURIAL {
                continue; // Somebody is at it.
            }
            let since = match seen.remove(&owner) {
                Some((before, since)) if before == score => since,
                _ => Instant::now(),
            };
            if number >= 0.0 && since.elapsed() < patience(number, self.came_back) {
                self.seen.insert(owner, (score, since));
                continue;
            }
            let Some(score) = restore::mark_dead(&self.link, &self.shared, &owner, Some(&score)).await?
            else {
                continue;
            };
            let count = restore::bury(&self.link, &self.shared, &owner, &score).await?;
            tracing::warn!(target: "celeriac.redis", worker = owner, count,
                "A worker died; what it held is back in its queues.");
        }
        Ok(())
    }
}

/// How long a session must stay silent that showed its last sign of life then.
fn patience(last: f64, came_back: Option<f64>) -> Duration {
    if came_back.is_some_and(|at| last < at) { ABSENT } else { OBSERVED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_fell_silent_before_we_came_back_may_be_waiting_to_connect_again() {
        assert_eq!(patience(100.0, None), OBSERVED);
        assert_eq!(patience(100.0, Some(90.0)), OBSERVED, "it was there after the outage");
        assert_eq!(patience(100.0, Some(110.0)), ABSENT);
    }
}
