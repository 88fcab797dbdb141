//! What the commands of the table do. Texts and shapes of the replies are Celery 5.7's.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::panel::{Panel, Stage};
use super::table::{Command, Others, find};
use super::{Answer, Request, is_true, show};
use crate::broker::topology::Queue;
use crate::protocol::{json, repr};
use crate::worker::hooks::Unstarted;
use crate::worker::revoked::matching;

/// Logger of the commands.
const LOGGER: &str = "celery.worker.control";

/// Carries out a request.
pub fn run(request: &Request, panel: &mut dyn Panel) -> Answer {
    let Some(command) = find(&request.method) else {
        // What the worker itself asks of the app is nobody else's business.
        if request.method.starts_with("celeriac.") {
            return Answer::Raised(format!("KeyError({})", repr::repr(&request.method)));
        }
        return Answer::Ask;
    };
    match check(command, &request.arguments) {
        Ok(()) => (command.run)(&request.arguments, panel),
        Err(refused) => Answer::Raised(refused),
    }
}

/// The `TypeError` of a Python function that is called like this, if there is one.
fn check(command: &Command, arguments: &Map<String, Value>) -> Result<(), String> {
    let name = command.name;
    let type_error = |text: String| Err(format!("TypeError({})", repr::repr(&text)));
    if let Others::Only(known) = command.others {
        let unknown =
            |given: &&String| !known.contains(&given.as_str()) && !command.required.contains(&given.as_str());
        if let Some(unknown) = arguments.keys().find(unknown) {
            return type_error(format!("{name}() got an unexpected keyword argument '{unknown}'"));
        }
    }
    let missing: Vec<String> = command
        .required
        .iter()
        .filter(|required| !arguments.contains_key(**required))
        .map(|missing| format!("'{missing}'"))
        .collect();
    match missing.as_slice() {
        [] => Ok(()),
        [one] => type_error(format!("{name}() missing 1 required positional argument: {one}")),
        [first @ .., last] => {
            let comma = if first.len() > 1 { "," } else { "" };
            let first = first.join(", ");
            let count = missing.len();
            type_error(format!(
                "{name}() missing {count} required positional arguments: {first}{comma} and {last}"
            ))
        }
    }
}

fn ok(value: impl Into<Value>) -> Answer {
    Answer::Reply(json!({"ok": value.into()}))
}

fn nok(text: impl Into<Value>) -> Answer {
    Answer::Reply(json!({"error": text.into()}))
}

/// Celery's `maybe_list` of texts: one, many or none.
fn texts(value: Option<&Value>) -> Vec<String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut seen = HashSet::new();
    let texts: Vec<String> = match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(values)) => values.iter().map(text).collect(),
        Some(Value::Object(members)) => members.keys().cloned().collect(),
        Some(value) => vec![text(value)],
    };
    texts.into_iter().filter(|text| seen.insert(text.clone())).collect()
}

/// A value as Python's `repr` shows it in a reply.
fn shown(value: &Value) -> String {
    json::to_string(value)
        .ok()
        .and_then(|text| repr::saferepr(&text, None, usize::MAX).ok())
        .unwrap_or_default()
}

fn text<'a>(arguments: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    arguments.get(name).and_then(Value::as_str)
}

fn flag(arguments: &Map<String, Value>, name: &str) -> bool {
    arguments.get(name).is_some_and(is_true)
}

/// Signals by their names.
const SIGNALS: [(&str, i32); 31] = [
    ("SIGHUP", 1),
    ("SIGINT", 2),
    ("SIGQUIT", 3),
    ("SIGILL", 4),
    ("SIGTRAP", 5),
    ("SIGABRT", 6),
    ("SIGBUS", 7),
    ("SIGFPE", 8),
    ("SIGKILL", 9),
    ("SIGUSR1", 10),
    ("SIGSEGV", 11),
    ("SIGUSR2", 12),
    ("SIGPIPE", 13),
    ("SIGALRM", 14),
    ("SIGTERM", 15),
    ("SIGSTKFLT", 16),
    ("SIGCHLD", 17),
    ("SIGCONT", 18),
    ("SIGSTOP", 19),
    ("SIGTSTP", 20),
    ("SIGTTIN", 21),
    ("SIGTTOU", 22),
    ("SIGURG", 23),
    ("SIGXCPU", 24),
    ("SIGXFSZ", 25),
    ("SIGVTALRM", 26),
    ("SIGPROF", 27),
    ("SIGWINCH", 28),
    ("SIGIO", 29),
    ("SIGPWR", 30),
    ("SIGSYS", 31),
];

/// The number of a signal given by name or number; absent: the default.
fn signal(arguments: &Map<String, Value>, panel: &dyn Panel) -> Result<i32, String> {
    let given = arguments.get("signal").filter(|signal| is_true(signal));
    let Some(given) = given else { return Ok(panel.default_signal()) };
    if let Some(number) = given.as_i64() {
        return i32::try_from(number).map_err(|_| format!("ValueError('no such signal: {number}')"));
    }
    let name = given.as_str().filter(|name| !name.chars().any(char::is_lowercase));
    let Some(name) = name else {
        return Err("TypeError('signal name must be uppercase string.')".to_owned());
    };
    let name = if name.starts_with("SIG") { name.to_owned() } else { format!("SIG{name}") };
    SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number).ok_or_else(|| {
        format!("AttributeError({})", repr::repr(&format!("module 'signal' has no attribute '{name}'")))
    })
}

// --- inspect ------------------------------------------------------------------------------------------

pub(super) fn ping(_: &Map<String, Value>, _: &mut dyn Panel) -> Answer {
    ok("pong")
}

pub(super) fn clock(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    Answer::Reply(json!({"clock": panel.clock().value()}))
}

pub(super) fn ask(_: &Map<String, Value>, _: &mut dyn Panel) -> Answer {
    Answer::Ask
}

pub(super) fn stats(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let clock = panel.clock().value();
    match panel.stats().show(clock) {
        Value::Object(figures) if panel.app_has_stats() => Answer::Told("celeriac.stats", figures),
        figures => Answer::Reply(figures),
    }
}

fn requests(panel: &dyn Panel, stage: Stage, safe: bool) -> Vec<Value> {
    let requests = panel.requests();
    let wanted = requests.iter().filter(|request| request.stage == stage);
    wanted.map(|request| show::request(request, panel.node(), safe)).collect()
}

pub(super) fn active(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    Answer::Reply(requests(panel, Stage::Active, flag(arguments, "safe")).into())
}

pub(super) fn reserved(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    Answer::Reply(requests(panel, Stage::Reserved, false).into())
}

pub(super) fn scheduled(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let requests = panel.requests();
    let scheduled = requests.iter().filter(|request| request.stage == Stage::Scheduled);
    let rows = scheduled.map(|request| {
        json!({
            "eta": request.headers.eta,
            "priority": 6,
            "request": show::request(request, panel.node(), false),
        })
    });
    Answer::Reply(rows.collect::<Vec<_>>().into())
}

pub(super) fn revoked(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    Answer::Reply(panel.revoked().ids().collect::<Vec<_>>().into())
}

/// Attributes other than the usual ones are known to the app alone.
pub(super) fn registered(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let items = texts(arguments.get("taskinfoitems"));
    let known = |item: &String| matches!(item.as_str(), "name" | "rate_limit" | "exchange" | "routing_key");
    if !items.iter().filter(|item| !item.starts_with('_')).all(known) {
        return Answer::Ask;
    }
    let items = if items.is_empty() { vec!["rate_limit".to_owned()] } else { items };
    let builtins = flag(arguments, "builtins");
    let mut tasks = panel.tasks();
    tasks.retain(|(name, _)| builtins || !name.starts_with("celery."));
    tasks.sort();
    let rows = tasks.into_iter().map(|(name, rate)| {
        let fields: Vec<String> = items
            .iter()
            .filter_map(|item| match item.as_str() {
                "name" => Some(format!("name={name}")),
                "rate_limit" => rate.as_ref().map(|rate| format!("rate_limit={rate}")),
                _ => None,
            })
            .collect();
        if fields.is_empty() { name } else { format!("{name} [{}]", fields.join(" ")) }
    });
    Answer::Reply(rows.collect::<Vec<_>>().into())
}

pub(super) fn query_task(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let requests = panel.requests();
    let mut found = Map::new();
    for id in texts(arguments.get("ids")) {
        let Some(request) = requests.iter().find(|request| request.headers.id == id) else { continue };
        let stage = match request.stage {
            Stage::Active => "active",
            Stage::Reserved => "reserved",
            Stage::Scheduled => "scheduled",
        };
        found.insert(id, json!([stage, show::request(request, panel.node(), false)]));
    }
    Answer::Reply(found.into())
}

pub(super) fn active_queues(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    Answer::Reply(panel.queues().iter().map(show::queue).collect::<Vec<_>>().into())
}

pub(super) fn hello(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let from = text(arguments, "from_node").unwrap_or_default();
    if from == panel.node() {
        return Answer::Reply(Value::Null);
    }
    tracing::info!(target: LOGGER, "sync with {from}");
    let revoked = panel.revoked();
    let news: Vec<String> =
        texts(arguments.get("revoked")).into_iter().filter(|id| !revoked.contains(id)).collect();
    if !news.is_empty() {
        panel.revoke(&news);
    }
    let revoked = panel.revoked();
    revoked.purge(tokio::time::Instant::now());
    let ids: Vec<String> = revoked.ids().map(str::to_owned).collect();
    Answer::Reply(json!({"revoked": ids, "clock": panel.clock().forward()}))
}

// --- control: tasks -----------------------------------------------------------------------------------

pub(super) fn revoke(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let ids = texts(arguments.get("task_id"));
    let signal = if flag(arguments, "terminate") { Some(signal(arguments, panel)) } else { None };
    panel.revoke(&ids);
    let wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
    let held: HashMap<String, (Stage, String)> = panel
        .requests()
        .iter()
        .filter(|request| wanted.contains(request.headers.id.as_str()))
        .map(|request| (request.headers.id.clone(), (request.stage, request.headers.task.clone())))
        .collect();
    let open: Vec<Unstarted> = ids
        .iter()
        .filter(|id| !matches!(held.get(*id), Some((Stage::Active, _))))
        .map(|id| Unstarted { id: id.clone(), task: held.get(id).map(|(_, task)| task.clone()) })
        .collect();
    if !open.is_empty() {
        panel.store_revoked(open);
    }
    let signal = match signal {
        None => {
            let listed = ids.join(", ");
            tracing::info!(target: LOGGER, "Tasks flagged as revoked: {listed}");
            return ok(format!("tasks {} flagged as revoked", set(&ids)));
        }
        Some(Err(error)) => return Answer::Raised(error),
        Some(Ok(signal)) => signal,
    };
    let known: Vec<String> = ids.into_iter().filter(|id| held.contains_key(id)).collect();
    if known.is_empty() {
        return ok("terminate: tasks unknown");
    }
    for id in &known {
        tracing::info!(target: LOGGER, "Terminating {id} ({signal})");
        if let Err(error) = panel.terminate(id, signal) {
            return Answer::Raised(error);
        }
    }
    ok(format!("terminate: {}", known.join(", ")))
}

/// A set of texts as Python shows it.
fn set(texts: &[String]) -> String {
    if texts.is_empty() {
        return "set()".to_owned();
    }
    let quoted: Vec<String> = texts.iter().map(|text| repr::repr(text)).collect();
    format!("{{{}}}", quoted.join(", "))
}

pub(super) fn terminate(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let mut arguments = arguments.clone();
    arguments.insert("terminate".to_owned(), Value::Bool(true));
    revoke(&arguments, panel)
}

pub(super) fn revoke_by_stamped_headers(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let signal = match signal(arguments, panel) {
        Ok(signal) => signal,
        Err(error) => return Answer::Raised(error),
    };
    let headers = match arguments.get("headers") {
        Some(Value::Object(headers)) => headers.clone(),
        Some(Value::Array(pairs)) => {
            let mut headers = Map::new();
            for pair in pairs {
                let Some((name, value)) = pair.as_str().and_then(|pair| pair.split_once('=')) else {
                    return Answer::Raised("IndexError('list index out of range')".to_owned());
                };
                headers.insert(name.to_owned(), value.split('=').next().unwrap_or_default().into());
            }
            headers
        }
        _ => return Answer::Raised("AttributeError('headers must be a mapping or a list')".to_owned()),
    };
    let values = |value: &Value| match value {
        Value::Array(values) => values.clone(),
        Value::Null => Vec::new(),
        value => vec![value.clone()],
    };
    for (name, value) in &headers {
        panel.revoked().insert_stamps(name, &values(value));
    }
    let listed = shown(&Value::Object(headers.clone()));
    if !flag(arguments, "terminate") {
        return ok(format!("headers {listed} flagged as revoked, but not terminated"));
    }
    let mut matched: Map<String, Value> = Map::new();
    let mut ids = Vec::new();
    for request in panel.requests().iter().filter(|request| request.stage == Stage::Active) {
        let Some(stamps) = &request.headers.stamps else { continue };
        for (name, value) in &headers {
            let found = matching(stamps, name, &values(value));
            if found.is_empty() {
                continue;
            }
            let all = matched.entry(name.clone()).or_insert_with(|| json!([]));
            if let Value::Array(all) = all {
                all.extend(found);
                let mut seen = Vec::new();
                all.retain(|value| {
                    !seen.contains(value) && {
                        seen.push(value.clone());
                        true
                    }
                });
            }
            ids.push(request.headers.id.clone());
        }
    }
    if matched.is_empty() {
        return ok(format!("headers {listed} were not terminated"));
    }
    ids.dedup();
    for id in &ids {
        if let Err(error) = panel.terminate(id, signal) {
            return Answer::Raised(error);
        }
    }
    let sets: Vec<String> = matched
        .iter()
        .map(|(name, found)| {
            let found: Vec<String> = found.as_array().into_iter().flatten().map(shown).collect();
            format!("{}: {{{}}}", repr::repr(name), found.join(", "))
        })
        .collect();
    ok(format!("headers defaultdict(<class 'set'>, {{{}}}) revoked", sets.join(", ")))
}

pub(super) fn rate_limit(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let task = text(arguments, "task_name").unwrap_or_default();
    let given = arguments.get("rate_limit").unwrap_or(&Value::Null);
    let rate = match rate(given) {
        Ok(rate) => rate,
        Err(Rate::Unit(unit)) => return Answer::Raised(format!("KeyError({})", repr::repr(&unit))),
        Err(Rate::Number(error)) => return nok(format!("Invalid rate limit string: {error}")),
    };
    let written = (!given.is_null()).then(|| given.as_str().map_or_else(|| given.to_string(), str::to_owned));
    if !panel.rate_limit(task, rate.filter(|rate| *rate > 0.0), written.as_deref()) {
        tracing::error!(target: LOGGER, "Rate limit attempt for unknown task {task}");
        return nok("unknown task");
    }
    if !is_true(given) {
        tracing::info!(target: LOGGER, "Rate limits disabled for tasks of type {task}");
        return ok("rate limit disabled successfully");
    }
    let written = written.unwrap_or_default();
    tracing::info!(target: LOGGER, "New rate limit for tasks of type {task}: {written}.");
    ok("new rate limit set successfully")
}

/// Why a rate cannot be read.
enum Rate {
    /// An unknown unit.
    Unit(String),
    /// No number; the `repr` of the error.
    Number(String),
}

/// Tasks a second of `100/m`, `2/h`, `0.5/s`, `3` or 3.
fn rate(given: &Value) -> Result<Option<f64>, Rate> {
    let Some(text) = given.as_str() else { return Ok(given.as_f64()) };
    if text.is_empty() {
        return Ok(None);
    }
    let (number, unit) = text.split_once('/').unwrap_or((text, "s"));
    let seconds = match unit {
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(Rate::Unit(other.to_owned())),
    };
    match number.trim().parse::<f64>() {
        Ok(number) => Ok(Some(number / seconds)),
        Err(_) => {
            let text = format!("could not convert string to float: {}", repr::repr(number));
            Err(Rate::Number(format!("ValueError({})", repr::repr(&text))))
        }
    }
}

pub(super) fn time_limit(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let task = text(arguments, "task_name").unwrap_or_default();
    let given = |name: &str| arguments.get(name).filter(|value| !value.is_null());
    let seconds = |name: &str| given(name).and_then(Value::as_f64);
    if let Some(wrong) = ["soft", "hard"].iter().find(|name| given(name).is_some() && seconds(name).is_none())
    {
        return Answer::Raised(format!("TypeError('{wrong} must be a number of seconds')"));
    }
    let (soft, hard) = (seconds("soft"), seconds("hard"));
    if !panel.time_limit(task, soft, hard) {
        tracing::error!(target: LOGGER, "Change time limit attempt for unknown task {task}");
        return nok("unknown task");
    }
    let said = |name: &str| given(name).map_or_else(|| "None".to_owned(), Value::to_string);
    tracing::info!(
        target: LOGGER,
        "New time limits for tasks of type {task}: soft={} hard={}", said("soft"), said("hard")
    );
    ok("time limits set successfully")
}

// --- control: worker ----------------------------------------------------------------------------------

pub(super) fn add_consumer(arguments: &Map<String, Value>, _: &mut dyn Panel) -> Answer {
    let Some(name) = text(arguments, "queue").filter(|name| !name.is_empty()) else {
        return Answer::Raised("TypeError('queue must be a name')".to_owned());
    };
    let mut queue = Queue::named(name);
    let given = |name: &str| text(arguments, name).filter(|text| !text.is_empty());
    for binding in &mut queue.bindings {
        if let Some(exchange) = given("exchange") {
            binding.exchange.name = exchange.to_owned();
        }
        if let Some(kind) = given("exchange_type") {
            binding.exchange.kind = kind.to_owned();
        }
        if let Some(key) = given("routing_key") {
            binding.routing_key = key.to_owned();
        }
    }
    Answer::Consume(Box::new(queue))
}

/// The reply once the queue is consumed.
pub(super) fn consumes(arguments: &Map<String, Value>) -> Answer {
    ok(format!("add consumer {}", text(arguments, "queue").unwrap_or_default()))
}

pub(super) fn cancel_consumer(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let name = text(arguments, "queue").unwrap_or_default();
    panel.cancel_consumer(name);
    ok(format!("no longer consuming from {name}"))
}

/// The argument `n`, 1 by default.
fn count(arguments: &Map<String, Value>) -> Result<usize, String> {
    match arguments.get("n") {
        None => Ok(1),
        Some(given) => given
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .ok_or_else(|| format!("TypeError('n must be a number of processes, not {}')", shown(given))),
    }
}

/// The reply of a worker whose pool follows the tasks.
fn autoscaled(name: &str) -> Answer {
    nok(format!("{name} is not supported with autoscale. Adjust autoscale range instead."))
}

pub(super) fn pool_grow(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    if panel.autoscales() {
        return autoscaled("pool_grow");
    }
    match count(arguments).and_then(|by| panel.grow(by)) {
        Ok(()) => ok("pool will grow"),
        Err(error) => Answer::Raised(error),
    }
}

pub(super) fn pool_shrink(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    if panel.autoscales() {
        return autoscaled("pool_shrink");
    }
    match count(arguments).and_then(|by| panel.shrink(by)) {
        Ok(()) => ok("pool will shrink"),
        Err(error) => Answer::Raised(error),
    }
}

pub(super) fn autoscale(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let bound = |name: &str| match arguments.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(given) => {
            given.as_u64().and_then(|count| u32::try_from(count).ok()).map(Some).ok_or_else(|| {
                format!("TypeError('{name} must be a number of processes, not {}')", shown(given))
            })
        }
    };
    if !panel.autoscales() {
        return Answer::Raised("ValueError('Autoscale not enabled')".to_owned());
    }
    match bound("max").and_then(|max| Ok((max, bound("min")?))) {
        Ok((max, min)) => match panel.autoscale(max, min) {
            Some((max, min)) => ok(format!("autoscale now max={max} min={min}")),
            None => Answer::Raised("ValueError('Autoscale not enabled')".to_owned()),
        },
        Err(error) => Answer::Raised(error),
    }
}

pub(super) fn enable_events(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    match panel.enable_events() {
        None => nok("event dispatcher unavailable"),
        Some(false) => ok("task events already enabled"),
        Some(true) => {
            tracing::info!(target: LOGGER, "Events of group {{task}} enabled by remote.");
            ok("task events enabled")
        }
    }
}

pub(super) fn disable_events(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    match panel.disable_events() {
        None => nok("event dispatcher unavailable"),
        Some(false) => ok("task events already disabled"),
        Some(true) => {
            tracing::info!(target: LOGGER, "Events of group {{task}} disabled by remote.");
            ok("task events disabled")
        }
    }
}

pub(super) fn heartbeat(_: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    tracing::debug!(target: LOGGER, "Heartbeat requested by remote.");
    panel.send_heartbeat();
    Answer::Reply(Value::Null)
}

pub(super) fn election(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    let (Some(id), Some(topic)) = (text(arguments, "id"), text(arguments, "topic")) else {
        return Answer::Raised("TypeError('id and topic must be texts')".to_owned());
    };
    panel.elect(id, topic, arguments.get("action").cloned().unwrap_or(Value::Null));
    Answer::Reply(Value::Null)
}

pub(super) fn shutdown(arguments: &Map<String, Value>, panel: &mut dyn Panel) -> Answer {
    tracing::warn!(target: LOGGER, "{}", text(arguments, "msg").unwrap_or("Got shutdown from remote"));
    panel.shutdown();
    Answer::Silent
}

#[cfg(test)]
mod tests;
