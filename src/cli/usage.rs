//! Clap's parsers made from the tables, and clap's complaints in the words that Celery's users know.

use std::collections::HashSet;
use std::fmt::Write as _;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

use super::flags::{self, Effect, Flag, Reading};
use super::{Parsed, UserOption, takes_value};

const PROGRAM: &str = "celeriac";

const ABOUT: &str = "The Celery worker, rebuilt in Rust.

Commands:
  worker  Run a worker
  doctor  Say which parts of the app run natively, which through Celery's Python, and why

Every other command of `celery` (inspect, control, beat, multi, …) is run by the installed Celery.";

const WORKER_ABOUT: &str = "Run a worker.

Words that are no options set configuration: `worker.prefetch_multiplier=1`, `.concurrency=4`, \
`task.acks_late=(bool)true`. An option may also come from the environment: CELERY_WORKER_CONCURRENCY=4.";

const DOCTOR_ABOUT: &str = "Say which parts of the app run natively, which through Celery's Python, and why.

It takes the options of the worker and looks at what `celeriac worker` would do with them; nothing is started.";

pub(super) fn global_parser() -> Command {
    base(PROGRAM)
        .about(ABOUT)
        .override_usage("celeriac [OPTIONS] COMMAND [ARGS]...")
        .args(args(flags::GLOBALS, &HashSet::new()))
        .allow_external_subcommands(true)
        .external_subcommand_value_parser(clap::value_parser!(String))
}

pub(super) fn command_parser(name: &str, table: &[Flag], user: &[UserOption]) -> Result<Command, String> {
    let mut taken = HashSet::new();
    for option in user {
        for spelling in &option.spellings {
            if !is_spelling(spelling) {
                return Err(format!("the app's option {spelling:?} is neither of the form --long nor -s"));
            }
            taken.insert(spelling.as_str());
        }
    }
    Ok(base(name)
        .bin_name(format!("{PROGRAM} {name}"))
        .about(if name == "worker" { WORKER_ABOUT } else { DOCTOR_ABOUT })
        .override_usage(format!("{PROGRAM} {name} [OPTIONS] [NS.KEY=VALUE]..."))
        .args(args(table, &taken))
        .args(user.iter().filter_map(user_arg))
        .arg(Arg::new("extra").num_args(0..).hide(true)))
}

fn base(name: &str) -> Command {
    Command::new(name.to_owned())
        .args_override_self(true)
        .disable_help_subcommand(true)
        .disable_help_flag(true)
        .arg(Arg::new("help").long("help").action(ArgAction::Help).help("Print this help"))
}

/// What the user's options leave of ours: as in click, the last definition of a spelling has it.
fn args<'a>(table: &'a [Flag], taken: &'a HashSet<&str>) -> impl Iterator<Item = Arg> + 'a {
    table.iter().filter_map(move |flag| {
        let free: Vec<&str> = flag.spellings.iter().copied().filter(|one| !taken.contains(one)).collect();
        let arg = spelled(Arg::new(flag.name), &free)?.help(help_of(flag)).help_heading(flag.heading);
        Some(if takes_value(flag) {
            valued(arg, 1).value_name(value_name(flag.reading)).action(ArgAction::Set)
        } else {
            arg.action(ArgAction::SetTrue)
        })
    })
}

/// A value may look like an option: `-c -1` is a wrong number, not two options.
fn valued(arg: Arg, values: usize) -> Arg {
    arg.num_args(values).allow_hyphen_values(true)
}

fn spelled(mut arg: Arg, spellings: &[&str]) -> Option<Arg> {
    let mut named = false;
    for spelling in spellings {
        if let Some(long) = spelling.strip_prefix("--") {
            arg = if arg.get_long().is_none() {
                arg.long(long.to_owned())
            } else {
                arg.visible_alias(long.to_owned())
            };
            named = true;
        } else if let Some(short) = spelling.chars().nth(1) {
            arg = if arg.get_short().is_none() { arg.short(short) } else { arg.visible_short_alias(short) };
            named = true;
        }
    }
    named.then_some(arg)
}

fn is_spelling(text: &str) -> bool {
    match text.strip_prefix("--") {
        Some(long) => !long.is_empty(),
        None => text.starts_with('-') && text.chars().count() == 2 && text != "--",
    }
}

fn user_arg(option: &UserOption) -> Option<Arg> {
    let spellings: Vec<&str> = option.spellings.iter().map(String::as_str).collect();
    let arg = spelled(Arg::new(format!("user:{}", option.name)), &spellings)?
        .help(option.help.clone())
        .help_heading("Options of the app");
    Some(match option.values {
        0 => arg.action(ArgAction::Count),
        values => valued(arg, values).action(ArgAction::Append),
    })
}

fn value_name(reading: Reading) -> String {
    match reading {
        Reading::Switch => String::new(),
        Reading::Text => "TEXT".to_owned(),
        Reading::Integer => "INTEGER".to_owned(),
        Reading::Float => "FLOAT".to_owned(),
        Reading::List => "LIST".to_owned(),
        Reading::Choice(choices) | Reading::Level(choices) => choices.join("|"),
        Reading::Concurrency => "INTEGER|auto".to_owned(),
        Reading::Autoscale => "MAX,MIN".to_owned(),
        Reading::Address => "HOST:PORT".to_owned(),
    }
}

fn help_of(flag: &Flag) -> String {
    match flag.effect {
        Effect::Works | Effect::Partly(_) => flag.help.to_owned(),
    }
}

pub(super) fn help(mut parser: Command) -> String {
    parser.render_help().to_string()
}

/// Clap's answer as ours.
pub(super) fn explain<T>(error: &clap::Error, parser: &Command, command: Option<&str>) -> Parsed<T> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.first().cloned().unwrap_or_default(),
        _ => String::new(),
    };
    let argument = named(ContextKind::InvalidArg);
    let option = argument.split([' ', '=']).next().unwrap_or_default();
    let problem = match error.kind() {
        ErrorKind::DisplayHelp => return Parsed::Exit { text: help(parser.clone()), code: 0 },
        ErrorKind::UnknownArgument => {
            let meant = named(ContextKind::SuggestedArg);
            let hint = if meant.is_empty() { String::new() } else { format!(" Did you mean '{meant}'?") };
            let problem = format!("No such option '{option}'.{hint}");
            let text = misplaced_app(option, command) + &message(&problem, command);
            return Parsed::Exit { text, code: 2 };
        }
        ErrorKind::InvalidValue | ErrorKind::WrongNumberOfValues | ErrorKind::TooFewValues => {
            format!("Option '{option}' requires an argument.")
        }
        ErrorKind::TooManyValues => format!("Option '{option}' does not take a value."),
        _ => plain(&error.render()),
    };
    wrong(&problem, command)
}

fn plain(text: &StyledStr) -> String {
    text.to_string().trim_start_matches("error: ").trim_end().to_owned()
}

/// `-A` was an option of every command before Celery 5, so it is what people misplace.
fn misplaced_app(option: &str, command: Option<&str>) -> String {
    match command {
        Some(command) if ["-A", "--app"].contains(&option) => format!(
            "`{option}` goes before the command since Celery 5.0:\n\
             {PROGRAM} {option} proj {command} <...>    and not    {PROGRAM} {command} {option} proj <...>\n"
        ),
        _ => String::new(),
    }
}

/// A usage error: status 2, as Celery's.
pub(super) fn wrong<T>(problem: &str, command: Option<&str>) -> Parsed<T> {
    Parsed::Exit { text: message(problem, command), code: 2 }
}

fn message(problem: &str, command: Option<&str>) -> String {
    let (path, usage) = match command {
        Some(command) => (format!("{PROGRAM} {command}"), "[OPTIONS]"),
        None => (PROGRAM.to_owned(), "[OPTIONS] COMMAND [ARGS]..."),
    };
    format!("Usage: {path} {usage}\nTry '{path} --help' for help.\n\nError: {problem}\n")
}

/// All options in Markdown.
pub(super) fn reference() -> String {
    let mut text = String::from(
        "# Options\n\nMade from `src/cli/flags.rs` (`celeriac._core.options_reference`); a test compares them.\n\n\
         Each option of `celeriac worker` is also read from the environment: `CELERY_WORKER_` and its name,\n\
         global ones from `CELERY_` and the name. Those that Celery does not have are read from `CELERIAC_` and the name,\n\
         too, which works for every way to start a worker.\n",
    );
    for (title, table) in
        [("celeriac", flags::GLOBALS), ("celeriac worker", flags::WORKER), ("celeriac doctor", flags::DOCTOR)]
    {
        let _ = write!(text, "\n## {title}\n\n| option | setting | effect |\n|---|---|---|\n");
        for flag in table {
            let spellings: Vec<String> = flag.spellings.iter().map(|one| format!("`{one}`")).collect();
            let setting = flag.setting.map(|name| format!("`{name}`")).unwrap_or_default();
            let value = match flag.reading {
                Reading::Switch => String::new(),
                reading => format!(" `{}`", value_name(reading).replace('|', "\\|")),
            };
            let _ = writeln!(text, "| {}{value} | {setting} | {} |", spellings.join(", "), effect_of(flag));
        }
    }
    text
}

fn effect_of(flag: &Flag) -> String {
    match flag.effect {
        Effect::Works => flag.help.to_owned(),
        Effect::Partly(values) => {
            let refused: Vec<String> = values
                .iter()
                .map(|(value, instead)| format!("`{value}` (**refused for now**: {instead})"))
                .collect();
            format!("{}. {}", flag.help, refused.join("; "))
        }
    }
}
