//! Which tasks are revoked: ids, bounded in number, and stamps, which are not. As in 5.7 an id is forgotten when it is
//! old only once the set is full, and the oldest go first.
//!
//! A broker that remembers keeps ids for the workers to come. Stamps end with the worker, as in Celery: nothing but a
//! restart lets tasks with a revoked stamp run again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::protocol::TaskHeaders;

/// Bounds of the set of ids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Most ids; 0: no bound.
    pub most: usize,
    /// How long an id is kept when the set is full; zero: for ever.
    pub keep: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { most: 50_000, keep: Duration::from_secs(10_800) }
    }
}

impl Bounds {
    /// For how many seconds from now a broker is to remember a revoke of a task that is due in `due` seconds: a task
    /// that waits for its `eta` is revoked for as long as it waits.
    pub fn lasts(&self, due: f64) -> f64 {
        if self.keep.is_zero() { f64::INFINITY } else { self.keep.as_secs_f64() + due.max(0.0) }
    }

    /// The bounds that `CELERY_WORKER_REVOKES_MAX` and `CELERY_WORKER_REVOKE_EXPIRES` set; `variable` reads one.
    ///
    /// # Errors
    /// A text that names the variable whose value is no number.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let mut bounds = Self::default();
        let invalid = |name: &str, kind: &str, text: &str| {
            format!("Invalid value for {name}: expected {kind}, got '{text}'")
        };
        if let Some(text) = variable("CELERY_WORKER_REVOKES_MAX") {
            bounds.most =
                text.trim().parse().map_err(|_| invalid("CELERY_WORKER_REVOKES_MAX", "int", &text))?;
        }
        if let Some(text) = variable("CELERY_WORKER_REVOKE_EXPIRES") {
            let seconds =
                text.trim().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            bounds.keep = seconds.ok_or_else(|| invalid("CELERY_WORKER_REVOKE_EXPIRES", "float", &text))?;
        }
        Ok(bounds)
    }
}

/// Why a task is revoked.
#[derive(Clone, Debug, PartialEq)]
pub enum Revoked {
    /// By its id.
    Id,
    /// By this stamp of it.
    Stamp {
        /// The stamp's name.
        name: String,
        /// The value that was revoked.
        value: Value,
    },
}

/// The revoked tasks of one worker.
#[derive(Debug, Default)]
pub struct RevokedTasks {
    bounds: Bounds,
    ids: HashMap<Arc<str>, u64>,
    by_age: BTreeMap<u64, (Instant, Arc<str>)>,
    serial: u64,
    stamps: HashMap<String, Vec<Value>>,
}

impl RevokedTasks {
    /// An empty set.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Its bounds.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Revokes an id, or makes it young again.
    pub fn insert(&mut self, id: &str, now: Instant) {
        let id: Arc<str> = Arc::from(id);
        self.serial += 1;
        if let Some(before) = self.ids.insert(id.clone(), self.serial) {
            self.by_age.remove(&before);
        }
        self.by_age.insert(self.serial, (now, id));
        if self.bounds.most > 0 && self.ids.len() >= self.bounds.most {
            self.purge(now);
        }
    }

    /// Whether the id is revoked.
    pub fn contains(&self, id: &str) -> bool {
        self.ids.contains_key(id)
    }

    /// All ids, the oldest first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.by_age.values().map(|(_, id)| &**id)
    }

    /// Forgets ids that are too many or too old.
    pub fn purge(&mut self, now: Instant) {
        while let Some((serial, (at, _))) = self.by_age.first_key_value() {
            let surplus = self.bounds.most > 0 && self.ids.len() > self.bounds.most;
            let old = !self.bounds.keep.is_zero() && now.saturating_duration_since(*at) >= self.bounds.keep;
            if !surplus && !old {
                break;
            }
            let serial = *serial;
            if let Some((_, id)) = self.by_age.remove(&serial) {
                self.ids.remove(&id);
            }
        }
    }

    /// Revokes all tasks that carry the stamp with one of these values.
    pub fn insert_stamps(&mut self, name: &str, values: &[Value]) {
        let known = self.stamps.entry(name.to_owned()).or_default();
        for value in values {
            if !known.contains(value) {
                known.push(value.clone());
            }
        }
    }

    /// Whether a task is revoked, by its id first.
    pub fn find(&self, headers: &TaskHeaders) -> Option<Revoked> {
        if self.contains(&headers.id) {
            return Some(Revoked::Id);
        }
        if self.stamps.is_empty() {
            return None;
        }
        let (names, stamps) = (headers.stamped_headers.as_ref()?, headers.stamps.as_ref()?);
        names.iter().find_map(|name| {
            let revoked = self.stamps.get(name)?;
            let value = matching(stamps, name, revoked).into_iter().next()?;
            Some(Revoked::Stamp { name: name.clone(), value })
        })
    }
}

/// The values of a stamp that are among `wanted`. A stamp is one value or a list of them; null is none.
pub fn matching(stamps: &Map<String, Value>, name: &str, wanted: &[Value]) -> Vec<Value> {
    let values = match stamps.get(name) {
        None | Some(Value::Null) => &[],
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    values.iter().filter(|value| wanted.contains(value)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn headers(id: &str, stamps: Value) -> TaskHeaders {
        let names: Vec<_> = stamps.as_object().unwrap().keys().cloned().collect();
        serde_json::from_value(json!({"task": "t", "id": id, "stamped_headers": names, "stamps": stamps}))
            .unwrap()
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_and_a_repeated_id_is_young_again() {
        let mut revoked = RevokedTasks::new(Bounds { most: 3, keep: Duration::ZERO });
        for id in ["a", "b", "a", "c", "d"] {
            revoked.insert(id, Instant::now());
        }
        assert_eq!(revoked.ids().collect::<Vec<_>>(), ["a", "c", "d"]);
        assert!(revoked.contains("a") && !revoked.contains("b"));
    }

    #[test]
    fn old_ids_are_forgotten_only_when_the_set_is_full_or_purged() {
        let mut revoked = RevokedTasks::new(Bounds { most: 3, keep: Duration::from_secs(10) });
        let start = Instant::now();
        revoked.insert("a", start);
        revoked.insert("b", start + Duration::from_secs(20));
        assert!(revoked.contains("a"));
        revoked.insert("c", start + Duration::from_secs(20));
        assert_eq!(revoked.ids().collect::<Vec<_>>(), ["b", "c"]);
        revoked.purge(start + Duration::from_secs(30));
        assert_eq!(revoked.ids().count(), 0);
        assert!(revoked.find(&headers("b", json!({}))).is_none());
    }

    #[test]
    fn stamps_match_by_value_one_or_many() {
        let mut revoked = RevokedTasks::default();
        revoked.insert_stamps("k", &[json!("v"), json!(3)]);
        for (stamps, found) in [
            (json!({"k": "v"}), Some(json!("v"))),
            (json!({"k": ["x", 3]}), Some(json!(3))),
            (json!({"k": "w"}), None),
            (json!({"k": null}), None),
            (json!({"other": "v"}), None),
            (json!({"other": "v", "k": ["v"]}), Some(json!("v"))),
        ] {
            let expected = found.map(|value| Revoked::Stamp { name: "k".into(), value });
            assert_eq!(revoked.find(&headers("1", stamps.clone())), expected, "{stamps}");
        }
        let undeclared: TaskHeaders =
            serde_json::from_value(json!({"task": "t", "id": "1", "stamps": {"k": "v"}})).unwrap();
        assert_eq!(revoked.find(&undeclared), None);
    }

    #[test]
    fn a_revoke_lasts_as_long_as_the_task_waits_and_then_as_any_other() {
        let bounds = Bounds { most: 1, keep: Duration::from_secs(60) };
        assert_eq!((bounds.lasts(0.0), bounds.lasts(-5.0), bounds.lasts(100.0)), (60.0, 60.0, 160.0));
        assert_eq!(Bounds { keep: Duration::ZERO, ..bounds }.lasts(1.0), f64::INFINITY);
    }

    #[test]
    fn an_id_is_found_before_a_stamp() {
        let mut revoked = RevokedTasks::default();
        revoked.insert("1", Instant::now());
        revoked.insert_stamps("k", &[json!("v")]);
        assert_eq!(revoked.find(&headers("1", json!({"k": "v"}))), Some(Revoked::Id));
    }

    #[test]
    fn bounds_come_from_the_environment_and_nonsense_is_named() {
        let env = |name: &str| match name {
            "CELERY_WORKER_REVOKES_MAX" => Some("7".to_owned()),
            _ => Some("1.5".to_owned()),
        };
        assert_eq!(Bounds::from_env(env), Ok(Bounds { most: 7, keep: Duration::from_millis(1500) }));
        assert_eq!(Bounds::from_env(|_| None), Ok(Bounds::default()));
        let error = Bounds::from_env(|_| Some("many".to_owned())).unwrap_err();
        assert!(error.contains("CELERY_WORKER_REVOKES_MAX"), "{error}");
        assert!(Bounds::from_env(|name| name.contains("EXPIRES").then(|| "-1".to_owned())).is_err());
    }
}
