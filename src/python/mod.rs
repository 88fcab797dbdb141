//! The border to Python; pyo3 is named nowhere else. Calls are coarse: a configuration in, frames, hooks.

mod broker;
mod child;
mod cli;
mod errors;
mod green;
mod hooks;
mod hosting;
mod ladder;
mod log;
mod replay;
mod run;

use pyo3::prelude::*;

/// `celeriac._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    cli::register(module)?;
    module.add_function(wrap_pyfunction!(ladder::foreign_broker, module)?)?;
    module.add_function(wrap_pyfunction!(ladder::knows_backend, module)?)?;
    module.add_function(wrap_pyfunction!(run::run_worker, module)?)?;
    module.add_function(wrap_pyfunction!(replay::remember, module)?)?;
    module.add_function(wrap_pyfunction!(replay::replay, module)?)?;
    module.add_class::<child::ChildPipe>()?;
    module.add_class::<child::Target>()?;
    module.add("CHORD_SCRIPT", crate::backend::redis::CHORD_SCRIPT)?;
    module.add_class::<broker::KombuPort>()?;
    module.add_class::<hosting::Desk>()?;
    Ok(())
}
