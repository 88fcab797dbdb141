//! Which address is tried next, and when: the failover list and the back-off, once for all brokers.
//!
//! Pure: it neither waits nor connects. The consumer asks [`Failover::current`] for the broker to connect to, says
//! how that went ([`Failover::connected`], [`Failover::failed`], [`Failover::lost`]) and does as the answer says.
//!
//! The rules are Celery's (5.7). The waits are 2, 4, 6, … 30 seconds; with several addresses all are tried before
//! each wait. `broker_connection_max_retries` counts attempts, the number in the log counts waits. A connection
//! that was up and is lost is tried again at once, from the head of the list.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Broker, BrokerConfig};
use crate::error::BrokerError;

/// By how much each wait is longer than the one before, and how long the first is.
const STEP: Duration = Duration::from_secs(2);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(30);
/// So many losses within [`RESTART_PERIOD`] are too many: the next attempt waits as long.
const RESTARTS: u32 = 5;
/// See [`RESTARTS`].
const RESTART_PERIOD: Duration = Duration::from_secs(1);

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Connect to [`Failover::current`] after `wait`.
    Retry {
        /// Place of the next address in the list.
        index: usize,
        /// Zero where another address of the list is tried first (`Will retry using next failover.`).
        wait: Duration,
        /// Waits so far, this one included: the first number of `(1/100)`.
        attempt: u32,
        /// `broker_connection_max_retries`: the second number; none: for ever.
        max: Option<u32>,
    },
    /// Stop the worker with exit status 1.
    GiveUp(Why),
}

/// Why the worker gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The server refused, or the address is wrong: trying again would not help.
    Refused,
    /// This setting is false.
    Disabled {
        /// `broker_connection_retry` or `broker_connection_retry_on_startup`.
        setting: &'static str,
    },
    /// `broker_connection_max_retries` is used up.
    Exhausted,
}

/// The addresses of the broker, and where we are in trying them.
pub struct Failover {
    brokers: Vec<Arc<dyn Broker>>,
    state: State,
}

impl std::fmt::Debug for Failover {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state.fmt(formatter)
    }
}

impl Failover {
    /// The brokers of [`addresses`], in that order.
    ///
    /// # Panics
    /// When there is none: the configuration refuses an empty list.
    pub fn new(brokers: Vec<Arc<dyn Broker>>, config: &BrokerConfig) -> Self {
        assert!(!brokers.is_empty(), "a worker has at least one broker address");
        let state = State::new(brokers.len(), config);
        Self { brokers, state }
    }

    /// The broker to connect to, or to which we are connected.
    pub fn current(&self) -> &Arc<dyn Broker> {
        &self.brokers[self.state.current]
    }

    /// All brokers.
    pub fn brokers(&self) -> &[Arc<dyn Broker>] {
        &self.brokers
    }

    /// Place of [`Failover::current`] in the list. Where it changes from one session to the next, so does the
    /// server: tags of the earlier session mean nothing to it.
    pub fn index(&self) -> usize {
        self.state.current
    }

    /// Connecting to [`Failover::current`] failed.
    pub fn failed(&mut self, error: &BrokerError) -> Next {
        self.state.failed(error.is_retryable())
    }

    /// Connecting worked.
    pub fn connected(&mut self) {
        self.state.connected();
    }

    /// A connection that was up is gone. The answer's wait is zero, or a second where that happens so often that
    /// Celery calls it `Frequent restarts detected`.
    pub fn lost(&mut self, now: Instant) -> Next {
        self.state.lost(now)
    }
}

/// The addresses of a configuration, one broker each: `;` parts addresses within one, too, and an address without
/// scheme has that of the first. The addresses of Redis sentinels are together one broker.
pub fn addresses(urls: &[String]) -> Vec<String> {
    let parts: Vec<&str> =
        urls.iter().flat_map(|url| url.split(';')).map(str::trim).filter(|part| !part.is_empty()).collect();
    let scheme = parts.first().and_then(|first| first.split_once("://")).map(|(scheme, _)| scheme);
    let whole = parts.iter().map(|part| match (part.contains("://"), scheme) {
        (false, Some(scheme)) => format!("{scheme}://{part}"),
        _ => (*part).to_owned(),
    });
    if scheme.is_some_and(|scheme| scheme.starts_with("sentinel")) {
        return vec![whole.collect::<Vec<_>>().join(";")];
    }
    whole.collect()
}

#[derive(Debug)]
struct State {
    count: usize,
    shuffle: bool,
    retry: bool,
    retry_on_startup: bool,
    max: Option<u32>,
    current: usize,
    /// What is still to be tried before the next wait.
    round: VecDeque<usize>,
    /// Failures since the last success.
    failures: u32,
    /// Waits since the last success.
    waits: u32,
    started: bool,
    restarts: u32,
    restarts_since: Option<Instant>,
}

impl State {
    fn new(count: usize, config: &BrokerConfig) -> Self {
        let mut state = Self {
            count,
            shuffle: config.failover_strategy.as_deref() == Some("shuffle"),
            retry: config.retry,
            retry_on_startup: config.retry_on_startup,
            max: config.max_retries,
            current: 0,
            round: VecDeque::new(),
            failures: 0,
            waits: 0,
            started: false,
            restarts: 0,
            restarts_since: None,
        };
        state.rewind();
        state
    }

    /// From the head of the list; the others of the first round follow.
    fn rewind(&mut self) {
        self.current = 0;
        self.failures = 0;
        self.waits = 0;
        let mut others: Vec<usize> = (1..self.count).collect();
        if self.shuffle {
            fastrand::shuffle(&mut others);
        }
        self.round = others.into();
    }

    fn disabled(&self) -> Option<Why> {
        match self.started {
            true if !self.retry => Some(Why::Disabled { setting: "broker_connection_retry" }),
            false if !self.retry_on_startup => {
                Some(Why::Disabled { setting: "broker_connection_retry_on_startup" })
            }
            _ => None,
        }
    }

    fn failed(&mut self, retryable: bool) -> Next {
        if !retryable {
            return Next::GiveUp(Why::Refused);
        }
        if let Some(why) = self.disabled() {
            return Next::GiveUp(why);
        }
        if self.max.is_some_and(|max| self.failures >= max) {
            return Next::GiveUp(Why::Exhausted);
        }
        self.failures = self.failures.saturating_add(1);
        let mut wait = Duration::ZERO;
        if self.round.is_empty() {
            self.waits = self.waits.saturating_add(1);
            wait = STEP.saturating_mul(self.waits).min(LONGEST);
            let mut all: Vec<usize> = (0..self.count).collect();
            if self.shuffle {
                fastrand::shuffle(&mut all);
            }
            self.round = all.into();
        }
        if let Some(next) = self.round.pop_front() {
            self.current = next;
        }
        self.retry_after(wait)
    }

    fn retry_after(&self, wait: Duration) -> Next {
        Next::Retry { index: self.current, wait, attempt: self.waits, max: self.max }
    }

    fn connected(&mut self) {
        self.started = true;
        self.failures = 0;
        self.waits = 0;
    }

    fn lost(&mut self, now: Instant) -> Next {
        self.started = true;
        if let Some(why) = self.disabled() {
            return Next::GiveUp(why);
        }
        self.rewind();
        let recent = self.restarts_since.is_some_and(|since| now.duration_since(since) < RESTART_PERIOD);
        if !recent {
            self.restarts_since = Some(now);
            self.restarts = 0;
        }
        self.restarts += 1;
        self.retry_after(if self.restarts > RESTARTS { RESTART_PERIOD } else { Duration::ZERO })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(count: usize, change: impl FnOnce(&mut BrokerConfig)) -> State {
        let mut config: BrokerConfig = serde_json::from_str(
            r#"{"urls": ["memory://"], "retry": true, "retry_on_startup": true, "max_retries": 100}"#,
        )
        .unwrap();
        change(&mut config);
        State::new(count, &config)
    }

    /// Index, seconds and the number shown, of the next failures.
    fn failures(state: &mut State, count: usize) -> Vec<(usize, u64, u32)> {
        let next = (0..count).map(|_| match state.failed(true) {
            Next::Retry { index, wait, attempt, .. } => (index, wait.as_secs(), attempt),
            Next::GiveUp(why) => panic!("gave up: {why:?}"),
        });
        next.collect()
    }

    #[test]
    fn waits_grow_by_two_seconds_up_to_thirty() {
        let waits: Vec<u64> =
            failures(&mut state(1, |_| {}), 18).into_iter().map(|(_, wait, _)| wait).collect();
        assert_eq!(waits, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 30, 30, 30]);
    }

    #[test]
    fn all_addresses_are_tried_before_each_wait() {
        let next = failures(&mut state(3, |_| {}), 7);
        assert_eq!(next, [(1, 0, 0), (2, 0, 0), (0, 2, 1), (1, 0, 1), (2, 0, 1), (0, 4, 2), (1, 0, 2)]);
    }

    #[test]
    fn shuffled_addresses_are_each_tried_once_a_round() {
        let mut state = state(4, |config| config.failover_strategy = Some("shuffle".to_owned()));
        let tried: Vec<usize> =
            std::iter::once(0).chain(failures(&mut state, 11).into_iter().map(|(index, ..)| index)).collect();
        for round in tried.chunks(4) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3]);
        }
    }

    #[test]
    fn retries_end_at_the_maximum_and_start_anew_after_a_success() {
        let mut state = state(1, |config| config.max_retries = Some(3));
        failures(&mut state, 3);
        assert_eq!(state.failed(true), Next::GiveUp(Why::Exhausted));
        state.connected();
        assert_eq!(failures(&mut state, 1), [(0, 2, 1)]);
    }

    #[test]
    fn without_a_maximum_retries_never_end() {
        let mut state = state(1, |config| config.max_retries = None);
        assert_eq!(failures(&mut state, 1000).last(), Some(&(0, 30, 1000)));
    }

    #[test]
    fn a_refusal_is_not_retried() {
        assert_eq!(state(2, |_| {}).failed(false), Next::GiveUp(Why::Refused));
    }

    #[test]
    fn each_setting_disables_retries_in_its_time() {
        let mut state = state(2, |config| config.retry_on_startup = false);
        assert_eq!(
            state.failed(true),
            Next::GiveUp(Why::Disabled { setting: "broker_connection_retry_on_startup" })
        );
        state.connected();
        assert_eq!(failures(&mut state, 1), [(1, 0, 0)]);

        let mut state = self::state(1, |config| config.retry = false);
        assert_eq!(failures(&mut state, 1), [(0, 2, 1)]);
        state.connected();
        let disabled = Next::GiveUp(Why::Disabled { setting: "broker_connection_retry" });
        assert_eq!(state.lost(Instant::now()), disabled);
        assert_eq!(state.failed(true), disabled);
    }

    #[test]
    fn a_lost_connection_is_tried_again_at_once_from_the_head_of_the_list() {
        let mut state = state(2, |_| {});
        failures(&mut state, 1);
        state.connected();
        assert_eq!(
            state.lost(Instant::now()),
            Next::Retry { index: 0, wait: Duration::ZERO, attempt: 0, max: Some(100) }
        );
        assert_eq!(failures(&mut state, 2), [(1, 0, 0), (0, 2, 1)]);
    }

    #[test]
    fn losses_in_quick_succession_are_slowed_down() {
        let mut state = state(1, |_| {});
        let start = Instant::now();
        let mut wait = |after: u64| match state.lost(start + Duration::from_millis(after)) {
            Next::Retry { wait, .. } => wait.as_millis(),
            Next::GiveUp(why) => panic!("gave up: {why:?}"),
        };
        assert_eq!((0..7).map(|number| wait(number * 10)).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 1000, 1000]);
        assert_eq!(wait(1500), 0);
    }

    #[test]
    fn addresses_may_be_a_list_or_parted_by_semicolons_and_sentinels_are_one() {
        for (urls, expected) in [
            (vec!["redis://a"], vec!["redis://a"]),
            (vec!["amqp://a//;amqp://b//"], vec!["amqp://a//", "amqp://b//"]),
            (vec!["amqp://a//", "amqp://b//;c"], vec!["amqp://a//", "amqp://b//", "amqp://c"]),
            (
                vec!["sentinel://a:1;sentinel://b:2", "sentinel://c:3"],
                vec!["sentinel://a:1;sentinel://b:2;sentinel://c:3"],
            ),
        ] {
            let urls: Vec<String> = urls.into_iter().map(str::to_owned).collect();
            assert_eq!(addresses(&urls), expected);
        }
    }
}
