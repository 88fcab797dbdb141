//! What Rust knows of the ladder, for `python/celeriac/ladder.py`.

use pyo3::prelude::*;
use serde::de::DeserializeOwned;

use super::errors::exception;
use crate::backend::{self, BackendConfig};
use crate::broker::{self, BrokerConfig};
use crate::error::Error;

/// The scheme of the first broker address that is not spoken natively; `None`: all are. Takes the `broker` part of
/// the configuration as JSON.
#[pyfunction]
pub(super) fn foreign_broker(py: Python<'_>, config: &str) -> PyResult<Option<String>> {
    let config: BrokerConfig = read(py, config)?;
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

/// Whether results can be written natively to the backend of this configuration: its `backend` and `broker` parts
/// as JSON.
#[pyfunction]
pub(super) fn knows_backend(py: Python<'_>, config: &str, broker: &str) -> PyResult<bool> {
    let (config, broker): (BackendConfig, BrokerConfig) = (read(py, config)?, read(py, broker)?);
    let backend = backend::by_url(&config, &broker)
        .map_err(|error| exception(py, &Error::Config(error.to_string())))?;
    Ok(backend.is_some())
}

fn read<T: DeserializeOwned>(py: Python<'_>, text: &str) -> PyResult<T> {
    serde_json::from_str(text)
        .map_err(|error| exception(py, &Error::Config(format!("configuration: {error}"))))
}
