//! Every option, once: the parser, the help text, the reference in `docs/options.md` and the refusals of what
//! is not there yet are all made from these tables.

/// How a value is read.
#[derive(Clone, Copy, Debug)]
pub enum Reading {
    /// Given or not.
    Switch,
    /// Any text.
    Text,
    /// A whole number.
    Integer,
    /// A number.
    Float,
    /// Texts separated by commas.
    List,
    /// One of these.
    Choice(&'static [&'static str]),
    /// One of these, in any case.
    Level(&'static [&'static str]),
    /// A whole number that is not negative, or `auto`.
    Concurrency,
    /// `max,min` or `max`.
    Autoscale,
    /// `host:port` or `:port`.
    Address,
}

/// What an option does in this version.
#[derive(Clone, Copy, Debug)]
pub enum Effect {
    /// What it does in Celery.
    Works,
    /// Refused with these values, each with what to do instead.
    Partly(&'static [(&'static str, &'static str)]),
}

/// An option.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// Heading in the help text.
    pub heading: &'static str,
    /// Name in Python, and in the environment behind the prefix of its command.
    pub name: &'static str,
    /// Spellings: `--long` ones and at most one `-s`.
    pub spellings: &'static [&'static str],
    /// How its value is read.
    pub reading: Reading,
    /// Environment variables read before `CELERY_<COMMAND>_<NAME>`.
    pub env: &'static [&'static str],
    /// The setting that it overrides.
    pub setting: Option<&'static str>,
    /// Help text.
    pub help: &'static str,
    /// What it does in this version.
    pub effect: Effect,
    /// Celery does not have it: python/celeriac/seam.py adds it to Celery's own command.
    pub own: bool,
}

impl Flag {
    /// Its spellings as messages show them: `-c / --concurrency`.
    pub fn spelled(&self) -> String {
        self.spellings.join(" / ")
    }
}

const PLAIN: Flag = Flag {
    heading: "",
    name: "",
    spellings: &[],
    reading: Reading::Text,
    env: &[],
    setting: None,
    help: "",
    effect: Effect::Works,
    own: false,
};

const GLOBAL: Flag = Flag { heading: "Global options", ..PLAIN };
const NODE: Flag = Flag { heading: "Worker options", ..PLAIN };
const POOL: Flag = Flag { heading: "Pool options", ..PLAIN };
const QUEUES: Flag = Flag { heading: "Queue options", ..PLAIN };
const FEATURES: Flag = Flag { heading: "Features", ..PLAIN };
const BEAT: Flag = Flag { heading: "Embedded beat", ..PLAIN };
const DAEMON: Flag = Flag { heading: "Daemon options", ..PLAIN };

const LEVELS: &[&str] = &["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "FATAL"];
const POOLS: &[&str] = &["prefork", "eventlet", "gevent", "solo", "processes", "threads", "custom"];

/// Options before the command.
pub const GLOBALS: &[Flag] = &[
    Flag {
        name: "app",
        spellings: &["-A", "--app"],
        env: &["APP"],
        help: "The app: `module`, `module:attribute` or `module.attribute`",
        ..GLOBAL
    },
    Flag {
        name: "broker",
        spellings: &["-b", "--broker"],
        env: &["BROKER_URL"],
        setting: Some("broker_url"),
        help: "Address of the broker",
        ..GLOBAL
    },
    Flag {
        name: "result_backend",
        spellings: &["--result-backend"],
        env: &["RESULT_BACKEND"],
        setting: Some("result_backend"),
        help: "Address of the result backend",
        ..GLOBAL
    },
    Flag {
        name: "loader",
        spellings: &["--loader"],
        env: &["LOADER"],
        help: "Loader class of the app",
        ..GLOBAL
    },
    Flag {
        name: "config",
        spellings: &["--config"],
        env: &["CONFIG_MODULE"],
        help: "Module with the settings",
        ..GLOBAL
    },
    Flag {
        name: "workdir",
        spellings: &["--workdir"],
        help: "Directory to change to before the app is imported",
        ..GLOBAL
    },
    Flag {
        name: "no_color",
        spellings: &["-C", "--no-color"],
        reading: Reading::Switch,
        env: &["NO_COLOR"],
        help: "No colours",
        ..GLOBAL
    },
    Flag {
        name: "quiet",
        spellings: &["-q", "--quiet"],
        reading: Reading::Switch,
        help: "No banner",
        ..GLOBAL
    },
    Flag {
        name: "version",
        spellings: &["--version"],
        reading: Reading::Switch,
        help: "Print the versions of Celery and celeriac",
        ..GLOBAL
    },
    Flag {
        name: "skip_checks",
        spellings: &["--skip-checks"],
        reading: Reading::Switch,
        env: &["SKIP_CHECKS"],
        help: "Skip Django's system checks",
        ..GLOBAL
    },
];

/// Options of `worker`.
pub const WORKER: &[Flag] = &[
    Flag {
        name: "hostname",
        spellings: &["-n", "--hostname"],
        help: "Name of the node; %h: host, %n: name, %d: domain",
        ..NODE
    },
    Flag {
        name: "detach",
        spellings: &["-D", "--detach"],
        reading: Reading::Switch,
        help: "Run in the background",
        ..NODE
    },
    Flag {
        name: "statedb",
        spellings: &["-S", "--statedb"],
        setting: Some("worker_state_db"),
        help: "File in which revoked tasks are remembered",
        ..NODE
    },
    Flag {
        name: "loglevel",
        spellings: &["-l", "--loglevel"],
        reading: Reading::Level(LEVELS),
        help: "Log level [default: WARNING]",
        ..NODE
    },
    Flag {
        name: "optimization",
        spellings: &["-O", "--optimization"],
        reading: Reading::Choice(&["default", "fair"]),
        help: "Both mean that a task goes only to an idle child",
        ..NODE
    },
    Flag {
        name: "prefetch_multiplier",
        spellings: &["--prefetch-multiplier"],
        reading: Reading::Integer,
        setting: Some("worker_prefetch_multiplier"),
        help: "Messages reserved per child",
        ..NODE
    },
    Flag {
        name: "disable_prefetch",
        spellings: &["--disable-prefetch"],
        reading: Reading::Switch,
        setting: Some("worker_disable_prefetch"),
        help: "Fetch a task only when a child is idle (Redis)",
        ..NODE
    },
    Flag {
        name: "concurrency",
        spellings: &["-c", "--concurrency"],
        reading: Reading::Concurrency,
        setting: Some("worker_concurrency"),
        help: "Number of children; `auto`: by the processor quota [default: processors]",
        ..POOL
    },
    Flag {
        name: "pool",
        spellings: &["-P", "--pool"],
        reading: Reading::Choice(POOLS),
        setting: Some("worker_pool"),
        help: "Kind of pool [default: prefork]",
        effect: Effect::Partly(&[(
            "custom",
            "use prefork, threads, solo, gevent or eventlet, or run `celery worker` without CELERIAC for this one",
        )]),
        ..POOL
    },
    Flag {
        name: "async_concurrency",
        spellings: &["--async-concurrency"],
        reading: Reading::Integer,
        env: &["CELERIAC_ASYNC_CONCURRENCY"],
        help: "Tasks that run at a time on one event loop; there are as many loops as children where the app has \
               `async def` tasks [default: 250]",
        own: true,
        ..POOL
    },
    Flag {
        name: "task_events",
        spellings: &["-E", "--task-events", "--events"],
        reading: Reading::Switch,
        setting: Some("worker_send_task_events"),
        help: "Send task events for monitors",
        ..POOL
    },
    Flag {
        name: "time_limit",
        spellings: &["--time-limit"],
        reading: Reading::Float,
        setting: Some("task_time_limit"),
        help: "Hard time limit of tasks that have none, seconds",
        ..POOL
    },
    Flag {
        name: "soft_time_limit",
        spellings: &["--soft-time-limit"],
        reading: Reading::Float,
        setting: Some("task_soft_time_limit"),
        help: "Soft time limit of tasks that have none, seconds",
        ..POOL
    },
    Flag {
        name: "max_tasks_per_child",
        spellings: &["--max-tasks-per-child"],
        reading: Reading::Integer,
        setting: Some("worker_max_tasks_per_child"),
        help: "Replace a child after so many tasks",
        ..POOL
    },
    Flag {
        name: "pool_start_method",
        spellings: &["--pool-start-method"],
        reading: Reading::Choice(&["fork", "spawn"]),
        setting: Some("worker_pool_start_method"),
        help: "How children are started",
        effect: Effect::Partly(&[(
            "spawn",
            "leave it out; celeriac forks from a process that has no threads, which spawn is meant to work around",
        )]),
        ..POOL
    },
    Flag {
        name: "max_memory_per_child",
        spellings: &["--max-memory-per-child"],
        reading: Reading::Integer,
        setting: Some("worker_max_memory_per_child"),
        help: "Replace a child after the task in which it has more than so many KiB for itself",
        ..POOL
    },
    Flag {
        name: "purge",
        spellings: &["--purge", "--discard"],
        reading: Reading::Switch,
        help: "Empty the queues first",
        ..QUEUES
    },
    Flag {
        name: "queues",
        spellings: &["-Q", "--queues"],
        reading: Reading::List,
        help: "Consume these queues only",
        ..QUEUES
    },
    Flag {
        name: "exclude_queues",
        spellings: &["-X", "--exclude-queues"],
        reading: Reading::List,
        help: "Do not consume these queues",
        ..QUEUES
    },
    Flag {
        name: "include",
        spellings: &["-I", "--include"],
        reading: Reading::List,
        help: "Import these modules too",
        ..QUEUES
    },
    Flag {
        name: "without_gossip",
        spellings: &["--without-gossip"],
        reading: Reading::Switch,
        help: "Do not listen to other workers' events",
        ..FEATURES
    },
    Flag {
        name: "without_mingle",
        spellings: &["--without-mingle"],
        reading: Reading::Switch,
        help: "Do not ask other workers for their state at start",
        ..FEATURES
    },
    Flag {
        name: "without_heartbeat",
        spellings: &["--without-heartbeat"],
        reading: Reading::Switch,
        help: "Send no heartbeats",
        ..FEATURES
    },
    Flag {
        name: "heartbeat_interval",
        spellings: &["--heartbeat-interval"],
        reading: Reading::Integer,
        help: "Seconds between heartbeats",
        ..FEATURES
    },
    Flag {
        name: "autoscale",
        spellings: &["--autoscale"],
        reading: Reading::Autoscale,
        help: "Most and fewest children: `max,min`; the pool follows the number of tasks (prefork)",
        ..FEATURES
    },
    Flag {
        name: "http",
        spellings: &["--http"],
        reading: Reading::Address,
        env: &["CELERIAC_HTTP"],
        help: "Serve /livez, /readyz and /metrics there; `:PORT`: at every address of the machine [default: nowhere]",
        own: true,
        ..FEATURES
    },
    Flag {
        name: "beat",
        spellings: &["-B", "--beat"],
        reading: Reading::Switch,
        help: "Run beat beside the worker, in a process that ends with it",
        ..BEAT
    },
    Flag {
        name: "schedule_filename",
        spellings: &["-s", "--schedule-filename", "--schedule"],
        setting: Some("beat_schedule_filename"),
        help: "Where beat remembers what has run",
        ..BEAT
    },
    Flag {
        name: "scheduler",
        spellings: &["--scheduler"],
        setting: Some("beat_scheduler"),
        help: "Scheduler class of beat",
        ..BEAT
    },
    Flag {
        name: "logfile",
        spellings: &["-f", "--logfile"],
        setting: Some("worker_logfile"),
        help: "Log file [default: stderr]",
        ..DAEMON
    },
    Flag {
        name: "log_format",
        spellings: &["--log-format"],
        reading: Reading::Choice(&["text", "json"]),
        env: &["CELERIAC_LOG_FORMAT"],
        help: "How records are written: Celery's text, or one JSON object a line [default: text]",
        own: true,
        ..DAEMON
    },
    Flag {
        name: "pidfile",
        spellings: &["--pidfile"],
        setting: Some("worker_pidfile"),
        help: "File for the process id; a second worker on it ends with status 73",
        ..DAEMON
    },
    Flag {
        name: "uid",
        spellings: &["--uid"],
        setting: Some("worker_uid"),
        help: "Become this user",
        ..DAEMON
    },
    Flag {
        name: "gid",
        spellings: &["--gid"],
        setting: Some("worker_gid"),
        help: "Become this group",
        ..DAEMON
    },
    Flag {
        name: "umask",
        spellings: &["--umask"],
        setting: Some("worker_umask"),
        help: "Mask of new files' permissions, with -D",
        ..DAEMON
    },
    Flag {
        name: "executable",
        spellings: &["--executable"],
        setting: Some("worker_executable"),
        help: "Python to run, with -D",
        ..DAEMON
    },
];

/// What `doctor` takes beside the options of the worker that it examines.
pub const DOCTOR: &[Flag] = &[Flag {
    heading: "Doctor options",
    name: "json",
    spellings: &["--json"],
    reading: Reading::Switch,
    help: "Print JSON",
    ..PLAIN
}];

/// The options of one of our commands.
pub fn of(command: &str) -> Vec<Flag> {
    let own = if command == "doctor" { DOCTOR } else { &[] };
    own.iter().chain(WORKER).copied().collect()
}
