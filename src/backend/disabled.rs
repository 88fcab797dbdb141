//! No result backend: what is stored is dropped, as by Celery's.

use async_trait::async_trait;
use bytes::Bytes;

use super::{Record, ResultBackend};
use crate::error::BackendError;

/// Keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct DisabledBackend;

#[async_trait]
impl ResultBackend for DisabledBackend {
    fn address(&self) -> String {
        "disabled://".to_owned()
    }

    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        records.iter().map(|_| Ok(())).collect()
    }

    async fn get(&self, task_id: &str) -> Result<Option<Bytes>, BackendError> {
        Err(BackendError::Refused {
            address: self.address(),
            what: format!("to read the result of {task_id}"),
            reason: "no result backend is configured".to_owned(),
        })
    }
}
