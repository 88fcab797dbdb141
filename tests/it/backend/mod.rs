//! The conformance suite of result backends: every check of [`checks`] runs against every implementation.
//!
//! A backend joins by implementing [`Harness`] and adding one line to the list below.

mod checks;
mod file;
mod memory;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use celeriac::backend::{Record, ResultBackend};

/// What the suite needs of one kind of backend.
pub(crate) trait Harness: Sized {
    /// An empty store on a running server. `None`: the server is not installed here.
    async fn start() -> Option<Self>;

    /// A worker's backend.
    fn backend(&self) -> Arc<dyn ResultBackend>;

    /// Whether results expire by themselves.
    fn expires(&self) -> bool;

    /// Makes the store unreachable; `false` where that cannot be.
    fn kill(&mut self) -> bool {
        false
    }
}

/// A result as Celery encodes it.
pub(crate) fn record(task_id: &str, state: &str, result: &str) -> Record {
    let document = format!(
        r#"{{"status": "{state}", "result": "{result}", "traceback": null, "children": [], "task_id": "{task_id}"}}"#
    );
    Record {
        task_id: task_id.to_owned(),
        state: state.to_owned(),
        document: Bytes::from(document),
        key: String::new(),
        expires: Some(Duration::from_secs(3600)),
        content_type: "application/json".to_owned(),
        content_encoding: "utf-8".to_owned(),
    }
}

checks::run!(on_memory: memory::MemoryHarness);
checks::run!(on_file: file::FileHarness);
