//! The border to Python; pyo3 is named nowhere else. Calls are coarse: a configuration in, frames, hooks.

mod errors;
mod hooks;
mod log;
mod run;

use pyo3::prelude::*;

/// `celeriac._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(run::run_worker, module)?)?;
    Ok(())
}
