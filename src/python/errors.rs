//! Our errors as the exceptions that users already catch. No other file makes one.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::Error;

/// The exception for an error: `ImproperlyConfigured` where the user has to change something,
/// `OperationalError` where a server is to blame.
pub(super) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let (module, name) = match error {
        Error::Config(_) => ("celery.exceptions", "ImproperlyConfigured"),
        Error::Broker(_) | Error::Backend(_) => ("kombu.exceptions", "OperationalError"),
        Error::Pool(_) | Error::Internal(_) => return PyRuntimeError::new_err(error.to_string()),
    };
    let made = py
        .import(module)
        .and_then(|module| module.getattr(name))
        .and_then(|class| class.call1((error.to_string(),)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}
