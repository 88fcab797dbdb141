//! The border to Python; pyo3 is named nowhere else. Calls are coarse: a configuration in, frames, hooks.

mod child;

use pyo3::prelude::*;

/// `celeriac._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<child::ChildPipe>()?;
    Ok(())
}
