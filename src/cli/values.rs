//! Values of options: from the line, else from the environment, read the same way, worded as Celery words it.

use std::collections::HashMap;

use clap::ArgMatches;
use serde_json::{Map, Value};

use super::flags::{Flag, Reading};
use super::takes_value;
use crate::probes::parse_address;

/// Words that mean yes and no, as click reads them.
const YES: [&str; 6] = ["1", "on", "t", "true", "y", "yes"];
const NO: [&str; 6] = ["0", "off", "f", "false", "n", "no"];

/// All values of a table. `prefix` makes the names of the variables: `CELERY_WORKER` + `_CONCURRENCY`.
pub(super) fn read(
    table: &[Flag],
    matches: &ArgMatches,
    env: &HashMap<String, String>,
    prefix: &str,
) -> Result<Map<String, Value>, String> {
    let mut values = Map::new();
    for flag in table {
        let value = match on_the_line(flag, matches) {
            Some(text) => value(flag, text)?,
            None => match in_env(flag, env, prefix) {
                Some(text) => value(flag, text)?,
                None => Value::Null,
            },
        };
        values.insert(flag.name.to_owned(), value);
    }
    Ok(values)
}

fn on_the_line<'a>(flag: &Flag, matches: &'a ArgMatches) -> Option<&'a str> {
    // An option of the app may have taken all spellings of ours.
    if !matches.ids().any(|id| id == flag.name) {
        return None;
    }
    if takes_value(flag) {
        return matches.get_one::<String>(flag.name).map(String::as_str);
    }
    matches.get_flag(flag.name).then_some("true")
}

fn in_env<'a>(flag: &Flag, env: &'a HashMap<String, String>, prefix: &str) -> Option<&'a str> {
    let own = format!("{prefix}_{}", flag.name.to_uppercase());
    flag.env
        .iter()
        .copied()
        .chain([own.as_str()])
        .find_map(|name| env.get(name))
        .map(String::as_str)
        .filter(|text| !text.is_empty())
}

/// A value as the option reads it, or what is wrong with it.
pub(super) fn value(flag: &Flag, text: &str) -> Result<Value, String> {
    parse(flag.reading, text).map_err(|why| {
        let spellings: Vec<String> = flag.spellings.iter().map(|one| format!("'{one}'")).collect();
        format!("Invalid value for {}: {why}", spellings.join(" / "))
    })
}

fn parse(reading: Reading, text: &str) -> Result<Value, String> {
    match reading {
        Reading::Text => Ok(text.into()),
        Reading::Switch => {
            let word = text.trim().to_lowercase();
            if YES.contains(&word.as_str()) {
                Ok(true.into())
            } else if NO.contains(&word.as_str()) {
                Ok(false.into())
            } else {
                Err(format!("'{text}' is not a valid boolean."))
            }
        }
        Reading::Integer => {
            let number: i64 = text.trim().parse().map_err(|_| format!("'{text}' is not a valid integer."))?;
            Ok(number.into())
        }
        Reading::Float => {
            let number: f64 = text.trim().parse().map_err(|_| format!("'{text}' is not a valid float."))?;
            Ok(number.into())
        }
        Reading::List => Ok(text.split(',').collect::<Vec<_>>().into()),
        Reading::Choice(choices) => one_of(choices, text),
        Reading::Level(levels) => one_of(levels, &text.to_uppercase()),
        Reading::Concurrency => match text.trim() {
            "" => Ok(Value::Null),
            word if word.eq_ignore_ascii_case("auto") => Ok("auto".into()),
            word => match word.parse::<u32>() {
                Ok(number) => Ok(number.into()),
                Err(_) => Err(format!("must be a non-negative integer or 'auto', got '{text}'")),
            },
        },
        Reading::Autoscale => autoscale(text),
        Reading::Address => parse_address(text).map(|_| text.into()),
    }
}

fn one_of(choices: &[&str], text: &str) -> Result<Value, String> {
    if choices.contains(&text) {
        return Ok(text.into());
    }
    let list: Vec<String> = choices.iter().map(|choice| format!("'{choice}'")).collect();
    Err(format!("'{text}' is not one of {}.", list.join(", ")))
}

/// `max,min` in either order; one number is the most, with 0 as the fewest.
fn autoscale(text: &str) -> Result<Value, String> {
    let numbers: Result<Vec<i64>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    match numbers.as_deref() {
        Ok([most]) => Ok(vec![*most, 0].into()),
        Ok([a, b]) => Ok(vec![*a.max(b), *a.min(b)].into()),
        _ => Err(format!("expected one or two integers separated by a comma, got '{text}'")),
    }
}
