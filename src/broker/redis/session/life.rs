//! Signs of life, renewal of what is held, and what is found on the way.

use std::time::Duration;

use tokio::time::Instant;

use super::Live;
use crate::broker::redis::link::{BEAT, Call};
use crate::broker::redis::routes::Bound;
use crate::broker::redis::sweep::{Findings, OVERDUE_LIMIT, SILENCE};
use crate::broker::{Event, Tag};
use crate::error::BrokerError;

/// Signs of life, often enough that three may be missed before anybody thinks of death.
const BEAT_EVERY: Duration = Duration::from_secs(2);
/// Renewals, where the visibility timeout leaves the choice to us.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// How long others leave a parked message to the worker that parked it once it is due, seconds.
const GRACE: f64 = 3.0;

/// Fields renewed by one script, which keeps the server from everybody else.
const RENEW_BATCH: usize = 2000;

/// Server time, numbers of the fields that are gone, overdue fields, silent sessions and their scores.
type Answer = (String, Vec<usize>, Vec<String>, Vec<String>);

impl Live {
    pub(super) async fn beat(&mut self) -> Result<(), BrokerError> {
        let timeout = self.shared.options.visibility_timeout;
        let third = Duration::from_secs_f64((timeout / 3.0).clamp(0.05, 60.0));
        let now = Instant::now();
        let (time, _, overdue, silent) = if now >= self.next_renewal {
            let answer = self.renew().await?;
            self.next_renewal = now + third.min(RENEW_EVERY);
            answer
        } else {
            self.show_life(&[]).await?
        };
        self.next_beat = now + third.min(BEAT_EVERY);
        if !overdue.is_empty() || !silent.is_empty() {
            let silent = silent.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
            let findings = Findings { now: time.parse().unwrap_or(0.0), overdue, silent };
            if let Some(sweeper) = &self.findings {
                // Still busy with the last ones: the next beat finds them again.
                let _ = sweeper.try_send(findings);
            }
        }
        if !self.skipped.is_empty() {
            // They may be lists by now.
            self.skipped.clear();
            self.ready = true;
        }
        self.refresh_bindings(now).await
    }

    /// Renews all that is held, and sees whether the other connection is alive.
    async fn renew(&mut self) -> Result<Answer, BrokerError> {
        let held: Vec<Tag> = self.held.iter().copied().collect();
        if let Some(subscriber) = &self.subscriber {
            // Nothing else is ever asked there, and a dead line would go unnoticed.
            subscriber.query::<redis::Value>(&redis::cmd("PING")).await?;
        }
        let (first, rest) = held.split_at(held.len().min(RENEW_BATCH));
        let answer = self.show_life(first).await?;
        for tags in rest.chunks(RENEW_BATCH) {
            self.show_life(tags).await?;
        }
        let renewed = held.iter().filter(|tag| self.held.contains(tag)).count();
        if renewed > 0 {
            self.emit(Event::Renewed(renewed));
        }
        Ok(answer)
    }

    async fn show_life(&mut self, renewed: &[Tag]) -> Result<Answer, BrokerError> {
        let keys = &self.shared.keys;
        let mut call = Call::new([keys.workers.as_str(), &keys.unacked_index]);
        let timeout = self.shared.options.visibility_timeout;
        call.arg(&self.owner).arg(timeout).arg(GRACE).arg(SILENCE).arg(OVERDUE_LIMIT);
        for tag in renewed {
            call.arg(self.shared.field(self.session, *tag));
        }
        let answer: Option<Answer> = self.link.eval(&BEAT, &call).await?;
        let answer = answer.ok_or_else(|| self.declared_dead())?;
        let gone: Vec<Tag> =
            answer.1.iter().filter_map(|number| renewed.get(number.wrapping_sub(1)).copied()).collect();
        if !gone.is_empty() {
            for tag in &gone {
                self.held.remove(tag);
            }
            self.emit(Event::Forgotten(gone));
        }
        Ok(answer)
    }

    async fn refresh_bindings(&mut self, now: Instant) -> Result<(), BrokerError> {
        if self.refresh_at.is_none_or(|at| now < at) {
            return Ok(());
        }
        self.refresh_at = None;
        let bound: Vec<Bound> =
            self.bound.iter().filter(|binding| binding.interval().is_some()).cloned().collect();
        for binding in &bound {
            binding.declare(&self.link, &self.shared).await?;
        }
        self.refresh_later(&bound);
        Ok(())
    }

    pub(super) fn declared_dead(&self) -> BrokerError {
        self.link.gone(
            "this session is not registered any more: another worker took it for dead after a long pause, or the \
             database was emptied",
        )
    }
}
