//! Results in this process, for tests and native programs. As with the broker of the same name, every name
//! (`memory://tests` has the name `tests`) is one store, kept as long as the process.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::{Record, ResultBackend, document};
use crate::error::BackendError;

static STORES: LazyLock<Mutex<HashMap<String, Store>>> = LazyLock::new(Mutex::default);

type Store = Arc<Mutex<HashMap<String, Stored>>>;

struct Stored {
    document: Bytes,
    until: Option<Instant>,
}

/// The results of a name.
#[derive(Clone)]
pub struct MemoryBackend {
    name: String,
    store: Store,
}

impl MemoryBackend {
    /// Access to the results that `url` names.
    pub fn open(url: &str) -> Self {
        let name = url.split_once("://").map_or(url, |(_, name)| name).trim_end_matches('/').to_owned();
        let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
        let store = Arc::clone(stores.entry(name.clone()).or_default());
        Self { name, store }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Stored>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stored {
    fn is_there(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

#[async_trait]
impl ResultBackend for MemoryBackend {
    fn address(&self) -> String {
        format!("memory://{}", self.name)
    }

    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        let mut store = self.lock();
        for record in records {
            let key = record.key();
            if store
                .get(&*key)
                .is_some_and(|stored| stored.is_there() && document::is_success(&stored.document))
            {
                continue;
            }
            let until = record.expires.map(|expires| Instant::now() + expires);
            store.insert(key.into_owned(), Stored { document: record.document.clone(), until });
        }
        records.iter().map(|_| Ok(())).collect()
    }

    async fn get(&self, task_id: &str) -> Result<Option<Bytes>, BackendError> {
        let mut store = self.lock();
        let key = super::key_of(task_id);
        if store.get(&key).is_some_and(|stored| !stored.is_there()) {
            store.remove(&key);
        }
        Ok(store.get(&key).map(|stored| stored.document.clone()))
    }
}
