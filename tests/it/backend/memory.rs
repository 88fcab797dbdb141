//! The suite on `memory://`.

use std::sync::Arc;

use celeriac::backend::ResultBackend;
use celeriac::backend::memory::MemoryBackend;

use super::Harness;
use crate::support::unique;

pub(crate) struct MemoryHarness(String);

impl Harness for MemoryHarness {
    async fn start() -> Option<Self> {
        Some(Self(format!("memory://{}", unique("results"))))
    }

    fn backend(&self) -> Arc<dyn ResultBackend> {
        Arc::new(MemoryBackend::open(&self.0))
    }

    fn expires(&self) -> bool {
        true
    }
}
