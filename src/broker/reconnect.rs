//! The failover list and the waits between attempts.

use std::time::Duration;

use super::BrokerConfig;
use crate::error::BrokerError;

/// What to do after an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Next {
    /// Try this one after this wait.
    Retry {
        /// Index in the failover list.
        index: usize,
        /// Wait before it.
        wait: Duration,
        /// Which attempt it is.
        attempt: u32,
        /// How many there may be.
        most: Option<u32>,
    },
    /// No more.
    GiveUp,
}

/// Counts attempts.
#[derive(Debug)]
pub struct Reconnect {
    count: usize,
    index: usize,
    attempt: u32,
    most: Option<u32>,
}

impl Reconnect {
    /// For so many brokers.
    pub fn new(count: usize, config: &BrokerConfig) -> Self {
        Self { count, index: 0, attempt: 0, most: config.max_retries }
    }

    /// An attempt failed.
    pub fn failed(&mut self, error: &BrokerError) -> Next {
        self.attempt += 1;
        if !error.is_retryable() || self.most.is_some_and(|most| self.attempt > most) {
            return Next::GiveUp;
        }
        self.index = (self.index + 1) % self.count;
        let wait = Duration::from_secs(u64::from(2 * self.attempt.min(15)));
        Next::Retry { index: self.index, wait, attempt: self.attempt, most: self.most }
    }

    /// A session that was up is gone.
    pub fn lost(&mut self) -> Next {
        Next::Retry { index: self.index, wait: Duration::ZERO, attempt: 0, most: self.most }
    }

    /// Connected.
    pub fn connected(&mut self) {
        self.attempt = 0;
    }
}
