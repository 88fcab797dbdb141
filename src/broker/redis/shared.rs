//! What one worker is at one server, across its sessions.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::keys::Keys;
use super::link::Call;
use super::options::Options;
use crate::broker::{Remembrance, Tag};

/// Names and bookkeeping that outlive a session.
///
/// A session registers as owner `<worker>.<session>` and its messages have the fields `<worker>.<session>:<tag>`.
/// The owner is the session and not the worker, because commands of a lost connection may still be carried out:
/// once the session is marked dead they take nothing any more. Parked messages, `<worker>~<tag>`, need no owner.
pub(crate) struct Shared {
    pub(crate) keys: Keys,
    pub(crate) options: Options,
    /// Masked.
    pub(crate) address: Arc<str>,
    worker: String,
    next_tag: AtomicU64,
    sessions: Mutex<Sessions>,
    parked: Mutex<HashSet<Tag>>,
    unparking: Mutex<HashSet<Tag>>,
    fleeting: Mutex<HashSet<Tag>>,
    unconfirmed: Mutex<Vec<String>>,
    unremembered: Mutex<Vec<Remembrance>>,
    declared: Mutex<HashSet<String>>,
}

#[derive(Default)]
struct Sessions {
    last: u64,
    /// Registered and not known to be buried.
    open: Vec<u64>,
}

impl Shared {
    pub(crate) fn new(keys: Keys, options: Options, address: &str) -> Self {
        let worker = uuid::Uuid::new_v4().simple().to_string();
        Self {
            keys,
            options,
            address: address.into(),
            worker: worker[..16].to_owned(),
            next_tag: AtomicU64::new(1),
            sessions: Mutex::default(),
            parked: Mutex::default(),
            unparking: Mutex::default(),
            fleeting: Mutex::default(),
            unconfirmed: Mutex::default(),
            unremembered: Mutex::default(),
            declared: Mutex::default(),
        }
    }

    /// A new session, and those before it that may have left something.
    pub(crate) fn begin(&self) -> (u64, Vec<u64>) {
        let mut sessions = lock(&self.sessions);
        let before = sessions.open.clone();
        sessions.last += 1;
        let session = sessions.last;
        sessions.open.push(session);
        lock(&self.declared).clear();
        (session, before)
    }

    /// A session that left nothing.
    pub(crate) fn ended(&self, session: u64) {
        let mut sessions = lock(&self.sessions);
        sessions.open.retain(|open| *open != session);
    }

    /// Deliveries that wait in the broker for their time.
    pub(crate) fn parked(&self) -> MutexGuard<'_, HashSet<Tag>> {
        lock(&self.parked)
    }

    /// Deliveries that were asked for and have not come yet.
    pub(crate) fn unparking(&self) -> MutexGuard<'_, HashSet<Tag>> {
        lock(&self.unparking)
    }

    /// Deliveries of fanout queues: they came by pub/sub, and the broker has no record of them.
    pub(crate) fn fleeting(&self) -> MutexGuard<'_, HashSet<Tag>> {
        lock(&self.fleeting)
    }

    /// Fields of settled deliveries whose deletion a lost session left undone, or without an answer.
    pub(crate) fn unconfirmed(&self) -> MutexGuard<'_, Vec<String>> {
        lock(&self.unconfirmed)
    }

    /// What a lost session was told to remember, or may not have had time for.
    pub(crate) fn unremembered(&self) -> MutexGuard<'_, Vec<Remembrance>> {
        lock(&self.unremembered)
    }

    /// Queues that were declared in this session for what is published to them.
    pub(crate) fn declared(&self) -> MutexGuard<'_, HashSet<String>> {
        lock(&self.declared)
    }

    /// The first of `count` fresh tags.
    pub(crate) fn tags(&self, count: u64) -> Tag {
        self.next_tag.fetch_add(count, Ordering::Relaxed)
    }

    pub(crate) fn owner(&self, session: u64) -> String {
        format!("{}.{session}", self.worker)
    }

    pub(crate) fn field(&self, session: u64, tag: Tag) -> String {
        format!("{}.{session}:{tag}", self.worker)
    }

    pub(crate) fn parked_field(&self, tag: Tag) -> String {
        format!("{}~{tag}", self.worker)
    }

    /// A call of a script whose first keys are those of the bookkeeping.
    pub(crate) fn call(&self) -> Call {
        Call::new([self.keys.workers.as_str(), &self.keys.unacked, &self.keys.unacked_index])
    }
}

// Nothing that could panic is done under these locks, so a poisoned one is still right.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
