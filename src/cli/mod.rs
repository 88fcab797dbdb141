//! The command line: `celeriac [globals] worker|doctor [options]`, read with clap from the tables in [`flags`].
//!
//! Two steps, as the app's own options are known only once the app is loaded: [`globals`] finds the command and
//! what concerns the app, [`command`] reads the rest. Both get the environment as data and change nothing.
//! Commands that are not ours belong to the installed Celery and are not looked at. What this parser has passed
//! then goes through Celery's own `worker` command, so that defaults and settings are those of the version installed.

pub mod flags;
mod usage;
mod values;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use flags::{Effect, Flag, Reading};

/// The commands that celeriac serves itself.
pub const COMMANDS: [&str; 2] = ["worker", "doctor"];

/// What came of a step.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Parsed<T> {
    /// The command line is right.
    Go(T),
    /// Print this and exit: help, the version, or what is wrong.
    Exit {
        /// What to print.
        text: String,
        /// 0 goes to stdout, everything else to stderr.
        code: i32,
    },
}

/// The first step: global options and the command.
#[derive(Debug, Serialize)]
pub struct Globals {
    /// Values by option name; null where neither the line nor the environment has one.
    pub options: Map<String, Value>,
    /// The command; none: nothing was asked for but help or the version.
    pub command: Option<String>,
    /// Whether the command is one of [`COMMANDS`].
    pub ours: bool,
    /// All that follows the command.
    pub arguments: Vec<String>,
}

/// The second step: the options of our command.
#[derive(Debug, Serialize)]
pub struct Options {
    /// Values by option name; null where neither the line nor the environment has one.
    pub options: Map<String, Value>,
    /// Words that are no options: `ns.key=value`.
    pub extra: Vec<String>,
}

/// An option that the app added: what it takes to get past it. Its values are read by click, which it was made for.
#[derive(Clone, Debug, Deserialize)]
pub struct UserOption {
    /// Its name in Python.
    pub name: String,
    /// `--long` and `-s` spellings, those that turn a switch off included.
    pub spellings: Vec<String>,
    /// Values that each use takes; 0: a switch.
    pub values: usize,
    /// Help text.
    #[serde(default)]
    pub help: String,
}

/// Reads the global options and finds the command.
pub fn globals(arguments: &[String], env: &HashMap<String, String>, version: &str) -> Parsed<Globals> {
    let parser = usage::global_parser();
    let matches = match parser.clone().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => return usage::explain(&error, &parser, None),
    };
    let options = match values::read(flags::GLOBALS, &matches, env, "CELERY") {
        Ok(options) => options,
        Err(problem) => return usage::wrong(&problem, None),
    };
    if options["version"] == Value::Bool(true) {
        return Parsed::Exit { text: format!("{version}\n"), code: 0 };
    }
    let Some((command, rest)) = matches.subcommand() else {
        return Parsed::Exit { text: usage::help(parser), code: 0 };
    };
    let arguments = rest.get_many::<String>("").map(|words| words.cloned().collect()).unwrap_or_default();
    let ours = COMMANDS.contains(&command);
    Parsed::Go(Globals { options, command: Some(command.to_owned()), ours, arguments })
}

/// Reads the options of our command `name`, with those that the app added.
pub fn command(
    name: &str,
    arguments: &[String],
    env: &HashMap<String, String>,
    user: &[UserOption],
) -> Parsed<Options> {
    let table = flags::of(name);
    let parser = match usage::command_parser(name, &table, user) {
        Ok(parser) => parser,
        Err(problem) => return usage::wrong(&problem, Some(name)),
    };
    let words = std::iter::once(name.to_owned()).chain(arguments.iter().cloned());
    let matches = match parser.clone().try_get_matches_from(words) {
        Ok(matches) => matches,
        Err(error) => return usage::explain(&error, &parser, Some(name)),
    };
    let prefix = format!("CELERY_{}", name.to_uppercase());
    let options = match values::read(&table, &matches, env, &prefix) {
        Ok(options) => options,
        Err(problem) => return usage::wrong(&problem, Some(name)),
    };
    // The doctor lists what would be refused instead.
    if name == "worker"
        && let Some(problem) = refusal(&options)
    {
        return usage::wrong(&problem, Some(name));
    }
    let extra = matches.get_many::<String>("extra").map(|words| words.cloned().collect()).unwrap_or_default();
    Parsed::Go(Options { options, extra })
}

/// Why these worker options cannot be served, in words for the user; none: they can. The options are named as
/// `celery.bin.worker` names its keyword arguments, so that this decides for both doors.
pub fn refusal(options: &Map<String, Value>) -> Option<String> {
    flags::WORKER.iter().find_map(|flag| {
        let value = options.get(flag.name).filter(|value| is_set(value))?;
        // Those of Celery were read by its command where they did not come through this parser.
        if flag.own
            && let Some(text) = value.as_str()
            && let Err(problem) = values::value(flag, text)
        {
            return Some(problem);
        }
        match flag.effect {
            Effect::Works => None,
            Effect::Partly(values) => {
                values.iter().find(|(name, _)| value == *name).map(|(name, instead)| {
                    format!("{} {name} is not supported by celeriac yet: {instead}.", flag.spelled())
                })
            }
        }
    })
}

fn is_set(value: &Value) -> bool {
    !(value.is_null() || *value == Value::Bool(false))
}

/// The worker's options that Celery does not have, as what python/celeriac/seam.py makes click's options of.
pub fn own_options() -> Value {
    let own = flags::WORKER.iter().filter(|flag| flag.own);
    own.map(|flag| {
        json!({
            "name": flag.name,
            "spellings": flag.spellings,
            "env": flag.env,
            "help": flag.help,
            "heading": flag.heading,
        })
    })
    .collect()
}

/// The reference of all options, in Markdown, for `docs/options.md`.
pub fn reference() -> String {
    usage::reference()
}

fn takes_value(flag: &Flag) -> bool {
    !matches!(flag.reading, Reading::Switch)
}

#[cfg(test)]
mod tests;
