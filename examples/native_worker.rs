//! A worker whose tasks are written in Rust; producers call them from Python as ever.
//!
//! ```text
//! cargo run --example native_worker -- redis://localhost:6379/0 redis://localhost:6379/1 celery
//!
//! >>> from celery import Celery
//! >>> app = Celery(broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
//! >>> app.send_task("tasks.add", (4, 6)).get()
//! 10
//! >>> app.send_task("tasks.resize", ("cat.png",), {"width": 0}).get()
//! ValueError: cannot resize cat.png to 0 pixels
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use celeriac::Worker;
use celeriac::native::{Args, Params, State, TaskContext, TaskError, TaskOptions};
use serde::{Deserialize, Serialize};

/// The positional arguments, as a tuple.
async fn add(Args((x, y)): Args<(i64, i64)>) -> Result<i64, TaskError> {
    x.checked_add(y).ok_or_else(|| TaskError::new("OverflowError", "the sum has more than 64 bits"))
}

#[derive(Deserialize)]
struct Resize {
    path: String,
    #[serde(default = "usual_width")]
    width: u32,
}

fn usual_width() -> u32 {
    80
}

#[derive(Serialize)]
struct Resized {
    path: String,
    resized_so_far: u64,
}

/// Shared by all calls.
#[derive(Clone, Default)]
struct Counter(Arc<AtomicU64>);

/// Arguments by position or by name, with a default; a result with members; a failure that Python knows.
async fn resize(
    Params(Resize { path, width }): Params<Resize>,
    State(counter): State<Counter>,
) -> Result<Resized, TaskError> {
    if width == 0 {
        return Err(TaskError::new("ValueError", format!("cannot resize {path} to 0 pixels")));
    }
    let resized_so_far = counter.0.fetch_add(1, Ordering::Relaxed) + 1;
    Ok(Resized { path: format!("{width}/{path}"), resized_so_far })
}

/// Any error of Rust is a failure, by `?`.
async fn parse(Args((text,)): Args<(String,)>) -> Result<i64, TaskError> {
    Ok(text.parse::<i64>()?)
}

/// The request itself.
async fn whoami(context: TaskContext) -> Result<String, TaskError> {
    Ok(format!("{} on {}", context.id, context.hostname))
}

/// Cut off by its time limit.
async fn sleep(Args((seconds,)): Args<(f64,)>) -> Result<(), TaskError> {
    tokio::time::sleep(Duration::try_from_secs_f64(seconds)?).await;
    Ok(())
}

/// A bug costs its own task only.
async fn panic() -> Result<(), TaskError> {
    panic!("this handler has a bug")
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // Broker, backend, queues.
    let mut addresses = std::env::args().skip(1);
    let broker = addresses.next().unwrap_or_else(|| "redis://localhost:6379/0".to_owned());
    let mut builder = Worker::builder()
        .broker(broker)
        .concurrency(16)
        .accept_content(["json", "pickle"])
        .result_extended(true)
        .state(Counter::default())
        .task("tasks.add", add)
        .task("tasks.resize", resize)
        .task("tasks.parse", parse)
        .task("tasks.whoami", whoami)
        .task("tasks.panic", panic)
        .task_with("tasks.sleep", TaskOptions::new().time_limit(Duration::from_secs(1)), sleep);
    if let Some(backend) = addresses.next() {
        builder = builder.backend(backend);
    }
    for queue in addresses {
        builder = builder.queue(queue);
    }
    match builder.run().await {
        Ok(exit) => {
            if let Some(broken) = exit.broken {
                eprintln!("stopped: {broken}");
            }
            ExitCode::from(u8::try_from(exit.code).unwrap_or(1))
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}
