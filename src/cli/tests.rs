use std::collections::HashMap;

use serde_json::{Value, json};

use super::flags::{self, Reading};
use super::*;

fn env(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn worker(line: &str) -> Options {
    match command("worker", &words(line), &env(&[]), &[]) {
        Parsed::Go(options) => options,
        Parsed::Exit { text, .. } => panic!("{line}: {text}"),
    }
}

fn complaint(line: &str) -> String {
    match command("worker", &words(line), &env(&[]), &[]) {
        Parsed::Exit { text, code: 2 } => text,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn every_option_is_read_under_each_of_its_spellings() {
    for flag in flags::WORKER {
        for spelling in flag.spellings {
            let (line, expected): (String, Value) = match flag.reading {
                Reading::Switch => ((*spelling).to_owned(), json!(true)),
                Reading::Text => (format!("{spelling} x"), json!("x")),
                Reading::Integer => (format!("{spelling} 7"), json!(7)),
                Reading::Float => (format!("{spelling} 1.5"), json!(1.5)),
                Reading::List => (format!("{spelling} a,b"), json!(["a", "b"])),
                Reading::Choice(choices) => (format!("{spelling} {}", choices[0]), json!(choices[0])),
                Reading::Level(_) => (format!("{spelling} info"), json!("INFO")),
                Reading::Concurrency => (format!("{spelling} 3"), json!(3)),
                Reading::Autoscale => (format!("{spelling} 2,10"), json!([10, 2])),
                Reading::Address => (format!("{spelling} :9000"), json!(":9000")),
            };
            assert_eq!(worker(&line).options[flag.name], expected, "{line}");
        }
    }
}

#[test]
fn an_option_that_celery_does_not_have_is_checked_wherever_it_comes_from() {
    for (name, value, complaint) in [
        ("http", "9000", Some("Invalid value for '--http': '9000' is not host:port or :port")),
        ("http", "localhost:9000", None),
        ("log_format", "xml", Some("Invalid value for '--log-format': 'xml' is not one of 'text', 'json'.")),
        ("log_format", "json", None),
    ] {
        let options = [(name.to_owned(), json!(value))].into_iter().collect();
        assert_eq!(refusal(&options).as_deref(), complaint, "{name} {value}");
    }
}

#[test]
fn an_option_that_is_not_given_is_null() {
    assert!(worker("").options.values().all(Value::is_null));
}

#[test]
fn every_option_is_also_read_from_the_environment() {
    let given = env(&[
        ("CELERY_WORKER_CONCURRENCY", "3"),
        ("CELERY_WORKER_PURGE", "yes"),
        ("CELERY_WORKER_QUEUES", ""),
    ]);
    let Parsed::Go(options) = command("worker", &[], &given, &[]) else { panic!("refused") };
    assert_eq!(options.options["concurrency"], json!(3));
    assert_eq!(options.options["purge"], json!(true));
    assert_eq!(options.options["queues"], Value::Null);
}

#[test]
fn the_line_wins_over_the_environment_and_the_last_use_over_the_first() {
    let given = env(&[("CELERY_WORKER_CONCURRENCY", "3")]);
    let Parsed::Go(options) = command("worker", &words("-c 4 --concurrency=5"), &given, &[]) else {
        panic!("refused")
    };
    assert_eq!(options.options["concurrency"], json!(5));
}

#[test]
fn words_that_are_no_options_are_handed_on() {
    let options = worker("worker.concurrency=2 -l INFO .prefetch_multiplier=1");
    assert_eq!(options.extra, ["worker.concurrency=2", ".prefetch_multiplier=1"]);
    assert_eq!(options.options["loglevel"], json!("INFO"));
}

#[test]
fn wrong_values_are_named_as_celery_names_them() {
    for (line, message) in [
        ("--bogus", "Error: No such option '--bogus'."),
        ("--purg", "Error: No such option '--purg'. Did you mean '--purge'?"),
        ("-Z", "Error: No such option '-Z'."),
        (
            "-c foo",
            "Error: Invalid value for '-c' / '--concurrency': must be a non-negative integer or 'auto', got 'foo'",
        ),
        ("-c -1", "must be a non-negative integer or 'auto', got '-1'"),
        (
            "-l foo",
            "Error: Invalid value for '-l' / '--loglevel': 'FOO' is not one of 'DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL', 'FATAL'.",
        ),
        ("-P bogus", "Error: Invalid value for '-P' / '--pool': 'bogus' is not one of 'prefork', "),
        ("-O x", "Error: Invalid value for '-O' / '--optimization': 'x' is not one of 'default', 'fair'."),
        ("--time-limit x", "Error: Invalid value for '--time-limit': 'x' is not a valid float."),
        (
            "--prefetch-multiplier x",
            "Error: Invalid value for '--prefetch-multiplier': 'x' is not a valid integer.",
        ),
        ("--concurrency", "Error: Option '--concurrency' requires an argument."),
        ("--purge=1", "Error: Option '--purge' does not take a value."),
        ("--autoscale a,b", "Invalid value for '--autoscale': expected one or two integers"),
        ("-A proj", "`-A` goes before the command"),
    ] {
        let text = complaint(line);
        assert!(text.contains(message), "{line}: {text}");
        assert!(text.contains("Usage: celeriac worker [OPTIONS]"), "{text}");
    }
}

#[test]
fn a_value_of_a_switch_in_the_environment_must_be_a_boolean() {
    let Parsed::Exit { text, code: 2 } = command("worker", &[], &env(&[("CELERY_WORKER_PURGE", "zz")]), &[])
    else {
        panic!("accepted")
    };
    assert!(
        text.contains("Invalid value for '--purge' / '--discard': 'zz' is not a valid boolean."),
        "{text}"
    );
}

#[test]
fn what_is_not_there_yet_is_refused_with_what_to_do() {
    for line in ["-P custom", "--pool-start-method spawn"] {
        assert!(complaint(line).contains("is not supported by celeriac yet: "), "{line}");
    }
    for line in [
        "-P prefork",
        "-P processes",
        "-P threads",
        "-P solo",
        "-P gevent",
        "-P eventlet",
        "--pool-start-method fork",
        "--without-mingle",
        "-E",
        "-S state",
        "-B -s schedule --scheduler proj:Scheduler",
    ] {
        worker(line);
    }
}

#[test]
fn refusals_read_the_keyword_arguments_of_both_doors() {
    let keywords =
        json!({"task_events": false, "pool_start_method": "fork", "autoscale": null, "concurrency": 4});
    assert_eq!(refusal(keywords.as_object().expect("an object")), None);
    let keywords = json!({"pool_start_method": "spawn"});
    let refused = refusal(keywords.as_object().expect("an object")).expect("refused");
    assert!(refused.contains("--pool-start-method spawn"), "{refused}");
}

#[test]
fn the_command_is_found_behind_the_global_options() {
    let line = words("celeriac -A proj --workdir /srv -q worker -l INFO -A x");
    let Parsed::Go(globals) = globals(&line, &env(&[]), "v") else { panic!("refused") };
    assert_eq!(globals.command.as_deref(), Some("worker"));
    assert!(globals.ours);
    assert_eq!(globals.options["app"], json!("proj"));
    assert_eq!(globals.options["workdir"], json!("/srv"));
    assert_eq!(globals.options["quiet"], json!(true));
    assert_eq!(globals.arguments, ["-l", "INFO", "-A", "x"]);
}

#[test]
fn the_app_may_come_from_either_variable_and_app_wins() {
    for (pairs, app) in [
        (vec![("CELERY_APP", "a")], "a"),
        (vec![("APP", "b")], "b"),
        (vec![("CELERY_APP", "a"), ("APP", "b")], "b"),
    ] {
        let Parsed::Go(globals) = globals(&words("celeriac worker"), &env(&pairs), "v") else {
            panic!("refused")
        };
        assert_eq!(globals.options["app"], json!(app));
    }
}

#[test]
fn commands_of_celery_are_not_looked_at() {
    let line = words("celeriac -A proj inspect ping --timeout 5 --nonsense");
    let Parsed::Go(globals) = globals(&line, &env(&[]), "v") else { panic!("refused") };
    assert!(!globals.ours);
    assert_eq!(globals.command.as_deref(), Some("inspect"));
}

#[test]
fn version_and_help_exit_with_0_and_a_wrong_global_option_with_2() {
    for (line, code, part) in [
        ("celeriac --version", 0, "5.7.0 (x)"),
        ("celeriac", 0, "worker  Run a worker"),
        ("celeriac --help", 0, "--result-backend"),
        ("celeriac --bogus", 2, "No such option '--bogus'."),
        ("celeriac --app", 2, "Option '--app' requires an argument."),
    ] {
        match globals(&words(line), &env(&[]), "5.7.0 (x)") {
            Parsed::Exit { text, code: got } => {
                assert_eq!(got, code, "{line}");
                assert!(text.contains(part), "{line}: {text}");
            }
            Parsed::Go(_) => panic!("{line}: accepted"),
        }
    }
}

fn option(name: &str, spellings: &[&str], values: usize) -> UserOption {
    UserOption {
        name: name.to_owned(),
        spellings: spellings.iter().map(|one| (*one).to_owned()).collect(),
        values,
        help: "Of the app".to_owned(),
    }
}

#[test]
fn options_of_the_app_are_passed_over_with_their_values() {
    let user = [
        option("team", &["--team", "-T", "-t"], 1),
        option("point", &["--point"], 2),
        option("loud", &["--loud", "--quiet-please"], 0),
    ];
    let line = words("-T red -t blue --team x --point 1 2 --loud --loud --quiet-please -c 2 .concurrency=3");
    let Parsed::Go(options) = command("worker", &line, &env(&[]), &user) else { panic!("refused") };
    assert_eq!(options.options["concurrency"], json!(2));
    assert_eq!(options.extra, [".concurrency=3"]);
}

#[test]
fn an_option_of_the_app_takes_a_spelling_away_from_ours() {
    let user = [option("environment", &["-E"], 1)];
    let Parsed::Go(options) = command("worker", &words("-E production"), &env(&[]), &user) else {
        panic!("refused")
    };
    assert_eq!(options.options["task_events"], Value::Null);
    assert_eq!(options.extra, [""; 0]);
}

#[test]
fn the_reference_names_every_option() {
    let text = reference();
    for flag in flags::GLOBALS.iter().chain(flags::WORKER).chain(flags::DOCTOR) {
        for spelling in flag.spellings {
            assert!(text.contains(&format!("`{spelling}`")), "{spelling}");
        }
    }
}

#[test]
fn the_help_of_a_command_lists_its_options_and_those_of_the_app() {
    let user = [option("team", &["--team"], 1)];
    let Parsed::Exit { text, code: 0 } = command("worker", &words("--help"), &env(&[]), &user) else {
        panic!("no help")
    };
    for part in ["--max-tasks-per-child", "--team", "Pool options", "Options of the app"] {
        assert!(text.contains(part), "{text}");
    }
}
