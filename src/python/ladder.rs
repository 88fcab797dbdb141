//! What Rust knows of the ladder, for `python/celeriac/ladder.py`.

use pyo3::prelude::*;

use super::errors::exception;
use crate::broker::{self, BrokerConfig};
use crate::error::Error;

/// The scheme of the first broker address that is not spoken natively; `None`: all are. Takes the `broker` part of
/// the configuration as JSON.
#[pyfunction]
pub(super) fn foreign_broker(py: Python<'_>, config: &str) -> PyResult<Option<String>> {
    let config: BrokerConfig = serde_json::from_str(config)
        .map_err(|error| exception(py, &Error::Config(format!("configuration of the broker: {error}"))))?;
    for url in &broker::reconnect::addresses(&config.urls) {
        let known =
            broker::by_url(url, &config).map_err(|error| exception(py, &Error::Config(error.to_string())))?;
        // The queues of `memory://` that Python producers fill are kombu's own, in its process.
        if known.is_none() || url.starts_with("memory:") {
            return Ok(Some(url.split("://").next().unwrap_or(url).to_owned()));
        }
    }
    Ok(None)
}
