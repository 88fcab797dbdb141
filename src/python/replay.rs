//! What a task has done already, done once more for Celery's tracer (`python/celeriac/tracer.py`).

use std::cell::RefCell;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

thread_local! {
    static ENDED: RefCell<Option<PyResult<Py<PyAny>>>> = const { RefCell::new(None) };
}

/// What the next [`replay`] in this thread does: raises the error, where there is one, or returns the value.
#[pyfunction]
#[pyo3(signature = (value, error = None))]
pub(super) fn remember(value: Py<PyAny>, error: Option<Bound<'_, PyAny>>) {
    let ended = match error {
        Some(error) => Err(PyErr::from_value(error)),
        None => Ok(value),
    };
    ENDED.set(Some(ended));
}

/// Stands for a task's function, whatever it is called with. No function of Python, so that it has no line in tracebacks.
#[pyfunction]
#[pyo3(signature = (*_args, **_kwargs))]
pub(super) fn replay(
    py: Python<'_>,
    _args: &Bound<'_, PyTuple>,
    _kwargs: Option<&Bound<'_, PyDict>>,
) -> PyResult<Py<PyAny>> {
    ENDED.take().unwrap_or_else(|| Ok(py.None()))
}
