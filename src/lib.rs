//! celeriac: the Celery worker, rebuilt in Rust. This page is its architecture.
//!
//! # The picture
//!
//! ```text
//! celeriac -A proj worker …            CPython; the pid that a service manager sees
//!   python/celeriac/cli.py, worker.py    finds the app, runs Celery's own start-up, forks the zygote, then becomes
//!   ├─ supervisor                        this crate: one thread with a tokio runtime; Python's main thread serves hooks
//!   ├─ beat, with -B (python/celeriac/beat.py)  Celery's own, forked beside the zygote, ends with the supervisor
//!   └─ zygote (python/celeriac/zygote.py)  one thread, the app imported, memory frozen; forks, reaps, reports
//!        ├─ children (python/celeriac/child.py)  decode, trace the task, answer with the outcome
//!        └─ children with an event loop (python/celeriac/loop.py)  the same, for coroutines, many at a time
//! ```
//!
//! A process that has threads never forks: the zygote is there before the runtime is. The supervisor decodes no body
//! and runs no task; nothing on the path of a healthy task takes its GIL.
//!
//! # The way of a task
//!
//! A [`broker::Session`] gives deliveries. [`worker::dispatch`] judges each by its headers: refused (the parent
//! reports, then settles) or a request. A request waits for its `eta` (parked in the broker where it can be), for its
//! turn under a rate limit, or for an idle slot; only idle slots take jobs, so nothing waits behind a long task. The
//! [`pool`] writes a frame to the child and reports what comes back: accepted, results to store, the outcome.
//! [`worker::acks`] alone decides what the broker is told, after it has confirmed what continues the task, results are
//! written and the parent has reported what no child could. Settlements, results and frames travel in batches of
//! whatever is ready; a lone one is never held back.
//!
//! A task whose `Request` or `Strategy` class is the app's own takes another way ([`worker::hosting`]): its message gets a
//! ticket, Celery's code makes and calls the app's objects on the main thread, and what they post to the pool goes
//! to a child as a pickled call. The settlement is theirs.
//!
//! A task whose function is a coroutine function runs on an event loop, as one of many. The loops are children of their
//! own, as many as there are processes, forked only for apps that have such tasks: in a child that also computes, or in
//! a thread of it, every coroutine would wait for the GIL, and one that does not end would take an ordinary task along.
//! Requests for loops wait apart from the others (`worker/ready.rs`), and one is interrupted by a frame, not by a signal
//! (`pool/loops.rs`). Celery's tracer is no coroutine and may be replaced by an integration; it runs in a greenlet, which
//! lends it to the loop wherever it would wait.
//!
//! # What always holds
//!
//! - A message is in its queue, or recorded as unacknowledged, or settled. On Redis one script takes and records it
//!   under a tag that only this worker has; an acknowledgement deletes only that tag.
//! - Early acks follow the child's word that it decoded the task, late ones the stored result, and that follows the
//!   broker's word that it has the continuation. A crash repeats work, it never loses it.
//! - What a worker holds on Redis it keeps alive; what a dead worker held comes back in seconds.
//! - A lost connection leaves nothing behind but the bookkeeping of deliveries; outcomes wait for the next.
//! - No task waits for an event: what the broker does not take is bounded, then dropped and counted.
//! - Whatever arrives on a queue gets one log line and one settlement; wire data cannot panic.
//! - A [`broker::Handle`] settles its delivery once. Dropped unsettled, it logs a bug and leaves the message to the
//!   broker.
//!
//! # The map
//!
//! | module | owns |
//! |---|---|
//! | [`protocol`] | bytes to types: messages, protocol 1, signatures, times, Python's JSON and `repr`, result documents; no I/O |
//! | [`broker`] | the trait, sessions, topology, the failover list; `redis`, `amqp`, `filesystem`, `memory` |
//! | [`backend`] | the trait and the result backends |
//! | [`pool`] | slots, event loops (`loops`), frames (`ipc`), children and the zygote's end (`processes`), when they are worn out (`wear`, `memory`) |
//! | [`worker`] | the loop (`consumer`; `intake`, `ready`, `outcomes`, `continuations`, `life`), its link to the broker, dispatch, acks, which events are told when, neighbours, schedule, autoscale, stopping |
//! | [`control`] | remote control as a table of commands |
//! | [`cluster`] | the logical clock; events and heartbeats; mingle and gossip, as state without I/O |
//! | [`native`] | tasks as async Rust functions, and the worker that runs them without Python |
//! | [`cli`] | the command line as a table of flags |
//! | [`logging`] | the line of a received task, where Python's logging need not see it |
//! | [`metrics`] | every metric's name in one table; what the loop counts, and the text of it |
//! | [`probes`] | `/livez`, `/readyz`, `/metrics`: an HTTP listener on a thread of its own |
//! | [`config`] | all that a worker is told before it starts, checked once |
//! | `python` | the border: hooks, the child's end of the frames, the bridge to kombu; `pyo3` is named nowhere else |
//!
//! Without the feature `python` the crate builds and passes its tests with no interpreter present.
//!
//! # The ladder
//!
//! Every concern has a native rung and one that calls Celery's or kombu's own objects; the choice is made once, at the
//! start, per app (python/celeriac/ladder.py), and `celeriac -A proj doctor` shows it with its reason. Celery's tracer is
//! looked up by attribute, so that integrations that replace it work.
//!
//! Plain tasks are traced by ours (python/celeriac/tracer.py): most of what an empty task costs a child is Celery's
//! tracer, and a request that nobody looks at. Ours makes one when it is asked for and does what Celery's does for a
//! task that succeeds, no more. Anything else it does not imitate: it runs Celery's tracer on what the task has returned or raised already,
//! which plays the function's part (`_core.replay`) without a line in the traceback.
//!
//! # Pools of greenlets
//!
//! gevent and eventlet patch Python before anything is imported, and a patched supervisor would wait for greenlets that
//! it never runs. So the zygote's fork becomes a new interpreter (python/celeriac/green.py) that patches, goes through
//! the supervisor's command line once more to find the app just so, and serves all slots over the one socket
//! (python/celeriac/greenlets.py): a greenlet reads frames, every job has its own. The pipe never waits in their thread
//! (src/python/green.rs). A process that was patched before it is asked becomes `python -m celeriac`.
//!
//! # What follows a task
//!
//! Celery's tracer calls `apply_async` of the next step. Where the ladder allows, a lane has put a step of ours in its
//! place (python/celeriac/continuations.py): the same mapping, so that user code sees no difference and whatever is
//! made of it is Celery's again. It hands arguments and options to the child's end of the pipe, where
//! [`protocol::signature`] puts them into Celery's own message of an empty call (a target: route, headers, version, all
//! caught from Celery once per task and child); what JSON cannot say as Celery says it goes back to Celery. The
//! supervisor publishes, and holds the result back until the broker has it.
//!
//! A member of a chord on Redis is counted by one script (src/backend/redis/chord.lua) after its result is written; the
//! child waits for the answer and runs Celery's own code for what then follows.
//!
//! # Decisions that cost something
//!
//! - **Waking on Redis without taking.** A blocking pop loses the message when its reply is lost, and a blocking move
//!   watches one list only. The session asks the server to be told when its lists change (client tracking) and then
//!   claims by script. Every idle worker is woken by a message; one gets it.
//! - **Fresh tags.** kombu keeps a message's tag through redelivery, so a late acknowledgement of the first holder
//!   deletes the second holder's record. Ours records every claim anew, and for the queue it was taken from.
//! - **Parked `eta`.** A far `eta` stays in `unacked` with the score `eta - visibility_timeout`: it takes no prefetch,
//!   and were all our workers to die a Python worker restores it in time.
//! - **Accepted means decoded.** The child reports a job as accepted after it decoded the body, so that a bad body is
//!   settled as Celery settles it although the supervisor never looks into one.
//! - **Protocol 1 that is not plain JSON goes to a child twice.** First as a job without a name, which the child
//!   answers with the same message in protocol 2 (python/celeriac/protocol1.py); that one is judged like any other.
//! - **Revokes that outlive the fleet.** On Redis what is revoked is also in a sorted set, read once a session and kept in
//!   memory, so that no task ever asks. The state file is Celery's own class on the main thread: ids are mirrored to
//!   `celery.worker.state` as they come, and pickles stay in Python.
//! - **What must agree with Celery's producers is declared by Celery.** The delay queues of native delayed delivery are
//!   shared with every Celery of the installed version, so that its own boot step declares them, once a connect.
//! - **Worn children have a spare.** A fork is quick and not free: one that begins when a child has left leaves a slot
//!   empty for that long. So a place may have a second child, up and idle, for the last moments of the first; when is
//!   reckoned from the pace of its tasks and the growth of its memory (`pool::wear`), so that none waits for hours.
//! - **Memory is private memory.** A child is born with the whole app resident and shares it; what it costs is what it
//!   has for itself. The kernel tells that slowly and what is resident quickly, and the one is never more than the other:
//!   most children are known to be light at the price of one short file.
//! - **The app's commands ask the loop.** What an app's remote control command calls on its `state` becomes a command of
//!   our own table, run by the loop while the main thread waits for the answer ([`worker::inside`]). The loop never waits
//!   for the main thread, or the two would wait for each other.
//! - **A queue is ours once the broker agrees.** One that is refused at run time would have every later connection refused.
//! - **Probes on a thread of their own.** `/livez` is answered beside the runtime, from the loop's pulse: a thread that
//!   sleeps is run at once however busy the others are, and a hung loop cannot answer for itself. Numbers are asked of
//!   the loop, which owns them as plain integers.
//! - **Failures of the parent in Python.** A lost child, a hard limit, a revoked or unknown task are reported through
//!   Celery's own `Request` and backend on the main thread: rare, and right for every backend.
//!
//! - **Consumers of boot steps have a thread.** Celery runs them in its main loop, on its connection; ours speaks no kombu.
//!   A thread of Python (python/celeriac/consumers.py) makes a kombu connection and calls the steps' methods itself, so
//!   that whatever they override works, and makes the connection anew without the core.
//! - **The app's own requests run Celery's code, not a copy of it.** Calling the hooks of a custom `Request` where Rust
//!   passes the same points would have been cheaper and never quite right: the class that Celery derives from it, what
//!   it posts to the pool and what comes back are all visible to it. So the parent pickles and unpickles for these
//!   tasks, and only for them. Scheduling stays with the core, or remote control would not see them; for a strategy it
//!   cannot, as nothing says which message a call is for.
//!
//! # Glossary
//!
//! | word | is |
//! |---|---|
//! | message | headers, properties and body as they travel |
//! | delivery | a message with the handle that settles it, once |
//! | request | a delivery accepted for a known task |
//! | job | a request handed to the pool |
//! | slot | the right to run one task |
//! | loop | a child with an event loop, whose slots share one thread |
//! | outcome | how a task ended, as data |
//! | settlement | what the broker is told |
//! | ticket | a message that the app's own objects decide about |
//! | call | a pickled function that such an object has a child run |
//! | incident | what the parent reports because no child will |
//! | spare | a child that is up and waits to take over the slots of one that is worn out |

pub mod backend;
pub mod broker;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod control;
pub mod error;
pub mod logging;
pub mod metrics;
pub mod native;
pub mod pool;
pub mod probes;
pub mod protocol;
#[cfg(feature = "python")]
mod python;
pub mod worker;

pub use native::Worker;
