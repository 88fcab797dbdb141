//! Tasks written in Rust: async functions as handlers, on the same worker that runs Python tasks.
//!
//! ```no_run
//! use celeriac::native::{Args, State, TaskError, Worker};
//!
//! #[derive(Clone)]
//! struct Prices { each: u64 }
//!
//! async fn total(Args((count,)): Args<(u64,)>, State(prices): State<Prices>) -> Result<u64, TaskError> {
//!     count.checked_mul(prices.each).ok_or_else(|| TaskError::new("OverflowError", "too many"))
//! }
//!
//! # async fn start() -> Result<(), celeriac::error::Error> {
//! Worker::builder()
//!     .broker("redis://localhost:6379/0")
//!     .backend("redis://localhost:6379/1")
//!     .state(Prices { each: 3 })
//!     .task("shop.total", total)
//!     .run()
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! A producer anywhere calls it by its name, `app.send_task("shop.total", (4,)).get()`, and sees a result or an
//! exception as it would of a Python task. Handlers run on the tokio runtime that [`WorkerBuilder::run`] is called on:
//! one that computes for long belongs into `tokio::task::spawn_blocking`. Log lines are `tracing` events, whose targets are
//! Celery's logger names; the program chooses who writes them.
//!
//! Not there yet, and refused rather than ignored: callbacks, chains and chords that a native task would have to
//! continue (such a task is recorded as failed with `NotImplementedError`, and not run), retries, compressed bodies.

mod app;
mod body;
mod context;
mod error;
mod extract;
mod handler;
mod hooks;
mod pool;
mod results;

pub use app::{TaskOptions, Worker, WorkerBuilder};
pub use context::TaskContext;
pub use error::TaskError;
pub use extract::{Args, Call, FromTask, Kwargs, Params, Rejection, State, States, Takes};
pub use handler::Handler;
