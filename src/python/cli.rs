//! The command line, for `python/celeriac/cli.py`: JSON out, as each function is called once a process.

use std::collections::HashMap;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde::Serialize;

use crate::{cli, control};

/// Adds the functions of this file.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(parse_globals, module)?)?;
    module.add_function(wrap_pyfunction!(parse_command, module)?)?;
    module.add_function(wrap_pyfunction!(refuse_options, module)?)?;
    module.add_function(wrap_pyfunction!(options_reference, module)?)?;
    module.add_function(wrap_pyfunction!(control_commands, module)?)?;
    module.add_function(wrap_pyfunction!(own_options, module)?)?;
    Ok(())
}

/// The global options and the command of `argv`; `version` is what `--version` prints.
#[pyfunction]
fn parse_globals(argv: Vec<String>, env: HashMap<String, String>, version: &str) -> PyResult<String> {
    json(&cli::globals(&argv, &env, version))
}

/// The options of one of our commands. `user` is a JSON list of the app's own options.
#[pyfunction]
fn parse_command(
    name: &str,
    arguments: Vec<String>,
    env: HashMap<String, String>,
    user: &str,
) -> PyResult<String> {
    let user: Vec<cli::UserOption> = serde_json::from_str(user).map_err(wrong)?;
    json(&cli::command(name, &arguments, &env, &user))
}

/// Why the worker options in this JSON object cannot be served; `None`: they can.
#[pyfunction]
fn refuse_options(options: &str) -> PyResult<Option<String>> {
    Ok(cli::refusal(&serde_json::from_str(options).map_err(wrong)?))
}

/// The worker's options that Celery does not have, as JSON.
#[pyfunction]
fn own_options() -> String {
    cli::own_options().to_string()
}

/// The reference of all options, in Markdown.
#[pyfunction]
fn options_reference() -> String {
    cli::reference()
}

/// Every command of remote control that is not the app's, as a JSON list.
#[pyfunction]
fn control_commands() -> PyResult<String> {
    json(&control::table::COMMANDS)
}

fn json(value: &impl Serialize) -> PyResult<String> {
    serde_json::to_string(value).map_err(wrong)
}

// Ours is the caller of these functions, so wrong JSON is a bug and no exception of the user's.
fn wrong(error: serde_json::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}
