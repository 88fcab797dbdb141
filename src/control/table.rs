//! One table: command, its alias, kind, arguments, function and what the page of commands says of it.

use serde::Serialize;
use serde_json::{Map, Value};

use super::Answer;
use super::commands::{
    active, active_queues, add_consumer, ask, autoscale, cancel_consumer, clock, disable_events, election,
    enable_events, heartbeat, hello, ping, pool_grow, pool_shrink, query_task, rate_limit, registered,
    reserved, revoke, revoke_by_stamped_headers, revoked, scheduled, shutdown, stats, terminate, time_limit,
};
use super::panel::Panel;

/// Whether a command asks or changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `celery inspect`.
    Inspect,
    /// `celery control`.
    Control,
}

/// Which arguments a command takes beside the required ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    /// Any; those it does not know are ignored.
    Any,
    /// These.
    Only(&'static [&'static str]),
}

pub(super) type Run = fn(&Map<String, Value>, &mut dyn Panel) -> Answer;

/// A row of the table.
#[derive(Serialize)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its old name.
    pub alias: Option<&'static str>,
    /// Asks or changes.
    pub kind: Kind,
    pub(super) required: &'static [&'static str],
    #[serde(skip)]
    pub(super) others: Others,
    #[serde(skip)]
    pub(super) run: Run,
    #[serde(skip)]
    help: &'static str,
}

impl Command {
    /// What it does, and which arguments it takes beside those.
    pub fn help(&self) -> &'static str {
        self.help
    }
}

const NONE: Others = Others::Only(&[]);

#[rustfmt::skip]
const fn row(
    name: &'static str, alias: Option<&'static str>, kind: Kind,
    required: &'static [&'static str], others: Others, run: Run, help: &'static str,
) -> Command {
    Command { name, alias, kind, required, others, run, help }
}

use Kind::{Control, Inspect};
use Others::{Any, Only};

/// All commands of our own. Any other is the app's.
#[rustfmt::skip]
pub const COMMANDS: &[Command] = &[
    row("ping", None, Inspect, &[], Any, ping,
        "Answers `pong`."),
    row("clock", None, Inspect, &[], Any, clock,
        "The logical clock."),
    row("conf", Some("dump_conf"), Inspect, &[], Any, ask,
        "The app's settings, secrets masked; `with_defaults`: those that were not changed, too."),
    row("report", None, Inspect, &[], NONE, ask,
        "Versions and settings, as text."),
    row("stats", None, Inspect, &[], Any, stats,
        "Counts of tasks, the pool, the broker, prefetch, resource usage, autoscaler, and what boot steps say of themselves."),
    row("active", Some("dump_active"), Inspect, &[], Any, active,
        "Tasks that run; `safe`: arguments as text."),
    row("reserved", Some("dump_reserved"), Inspect, &[], Any, reserved,
        "Tasks that wait for a child or for their turn under a rate limit."),
    row("scheduled", Some("dump_schedule"), Inspect, &[], Any, scheduled,
        "Tasks that wait for their `eta`."),
    row("revoked", Some("dump_revoked"), Inspect, &[], Any, revoked,
        "Ids that are revoked."),
    row("registered", Some("dump_tasks"), Inspect, &[], Any, registered,
        "Tasks of the app; `taskinfoitems`: attributes to show, `builtins`: Celery's own, too."),
    row("memsample", None, Inspect, &[], Any, ask,
        "Resident memory of the worker's main process (needs psutil)."),
    row("memdump", None, Inspect, &[], Any, ask,
        "Such samples since the last one; `samples`: how many."),
    row("objgraph", None, Inspect, &[], Only(&["num", "max_depth", "type"]), ask,
        "A drawing of objects in the main process (needs objgraph); `num`, `max_depth`, `type`."),
    row("query_task", None, Inspect, &["ids"], Any, query_task,
        "Where tasks of these `ids` are: `active`, `reserved` or `scheduled`."),
    row("active_queues", None, Inspect, &[], NONE, active_queues,
        "Queues that are consumed."),
    row("hello", None, Inspect, &["from_node"], Any, hello,
        "What a worker that starts asks the others: clock and revoked ids; `revoked`: its own."),
    row("revoke", None, Control, &["task_id"], Any, revoke,
        "Tasks of these ids will not run; `terminate` ends running ones with `signal`."),
    row("revoke_by_stamped_headers", None, Control, &["headers"], Any, revoke_by_stamped_headers,
        "The same by stamps: a mapping, or `key=value` texts."),
    row("terminate", None, Control, &["signal", "task_id"], Any, terminate,
        "`revoke` with `terminate`."),
    row("rate_limit", None, Control, &["task_name", "rate_limit"], Any, rate_limit,
        "Changes a task's rate limit, also for tasks that wait under it; 0: none."),
    row("time_limit", None, Control, &[], Any, time_limit,
        "Changes a task's limits: `task_name`, `soft`, `hard`, seconds."),
    row("add_consumer", None, Control, &["queue"], Any, add_consumer,
        "Consumes one more queue: `exchange`, `exchange_type`, `routing_key`, or one of the app's by its name."),
    row("cancel_consumer", None, Control, &["queue"], Any, cancel_consumer,
        "Stops consuming a queue."),
    row("pool_grow", None, Control, &[], Any, pool_grow,
        "Adds `n` children (1)."),
    row("pool_shrink", None, Control, &[], Any, pool_shrink,
        "Takes `n` children away (1), idle ones first."),
    row("pool_restart", None, Control, &[], Any, ask,
        "Replaces the children; `modules` are loaded before, `reload` anew. Needs `worker_pool_restarts`."),
    row("autoscale", None, Control, &[], Only(&["max", "min"]), autoscale,
        "Changes the bounds of `--autoscale`."),
    row("enable_events", None, Control, &[], NONE, enable_events,
        "Sends task events."),
    row("disable_events", None, Control, &[], NONE, disable_events,
        "Sends none."),
    row("heartbeat", None, Control, &[], NONE, heartbeat,
        "Sends `worker-heartbeat` now."),
    row("election", None, Control, &["id", "topic"], Any, election,
        "Has the workers elect one of them that carries out `action`."),
    row("shutdown", None, Control, &[], Any, shutdown,
        "A warm stop."),
];

/// The command of this name or alias.
pub fn find(method: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == method || command.alias == Some(method))
}
