//! An async function as a task.

use futures_util::future::BoxFuture;
use serde::Serialize;

use super::error::TaskError;
use super::extract::{Call, FromTask, Rejection, States, Takes};
use crate::protocol::json;

/// A task handler: an async function of up to eight extractors that gives a `Result`. Implemented for all of them;
/// `M` only tells them apart.
///
/// ```
/// use celeriac::native::{Args, Handler, TaskError};
///
/// async fn add(Args((x, y)): Args<(i64, i64)>) -> Result<i64, TaskError> {
///     Ok(x + y)
/// }
///
/// fn is_handler<M>(_: impl Handler<M>) {}
/// is_handler(add);
/// ```
///
/// What is no argument of a task does not compile:
///
/// ```compile_fail
/// use celeriac::native::{TaskError, Worker};
///
/// async fn add(x: i64, y: i64) -> Result<i64, TaskError> {
///     Ok(x + y)
/// }
///
/// Worker::builder().task("tasks.add", add);
/// ```
///
/// Nor does a function that is not async, or whose result cannot be stored:
///
/// ```compile_fail
/// use celeriac::native::{Args, TaskError, Worker};
///
/// Worker::builder().task("tasks.add", |Args((x,)): Args<(i64,)>| Ok::<i64, TaskError>(x));
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a task handler",
    label = "not a handler",
    note = "a handler is an `async fn` whose arguments are extractors (`Args`, `Kwargs`, `Params`, `State`, `TaskContext`) and which gives `Result<T, E>` with `T: Serialize` and `E: Into<TaskError>`"
)]
pub trait Handler<M>: Send + Sync + 'static {
    /// Checks, when the worker is built, what does not depend on a call.
    ///
    /// # Errors
    /// When no call can ever fit.
    fn check(&self, states: &States) -> Result<(), Rejection>;

    /// Runs one call; gives the JSON text of the result.
    fn call(&self, call: Call) -> BoxFuture<'static, Result<String, TaskError>>;
}

/// Refuses arguments that no extractor takes.
fn refuse_untaken(call: &Call, takes: Takes) -> Result<(), Rejection> {
    let task = || call.context.task.clone();
    if !takes.args && !call.arguments.args.is_empty() {
        return Err(Rejection::Count { task: task(), takes: 0, given: call.arguments.args.len() });
    }
    match call.arguments.kwargs.keys().next() {
        Some(name) if !takes.kwargs => Err(Rejection::Unexpected { task: task(), name: name.clone() }),
        _ => Ok(()),
    }
}

fn stored<R: Serialize, E: Into<TaskError>>(result: Result<R, E>) -> Result<String, TaskError> {
    // As kombu: a result that cannot be encoded is a failure of the task.
    json::to_string(&result.map_err(Into::into)?)
        .map_err(|error| TaskError::new("kombu.exceptions.EncodeError", error.to_string()))
}

macro_rules! handlers {
    ($(($($part:ident),*))*) => {
        $(impl<F, Fut, R, E, $($part,)*> Handler<($($part,)*)> for F
        where
            F: Fn($($part),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Result<R, E>> + Send + 'static,
            R: Serialize,
            E: Into<TaskError>,
            $($part: FromTask,)*
        {
            fn check(&self, states: &States) -> Result<(), Rejection> {
                let _ = states;
                $($part::check(states)?;)*
                Ok(())
            }

            fn call(&self, call: Call) -> BoxFuture<'static, Result<String, TaskError>> {
                const NOTHING: Takes = Takes { args: false, kwargs: false };
                let extracted = (|| {
                    refuse_untaken(&call, NOTHING$(.and($part::TAKES))*)?;
                    Ok::<_, Rejection>(($($part::from_task(&call)?,)*))
                })();
                match extracted {
                    Ok(($($part,)*)) => {
                        let running = self($($part),*);
                        Box::pin(async move { stored(running.await) })
                    }
                    Err(rejection) => Box::pin(std::future::ready(Err(rejection.into_error()))),
                }
            }
        })*
    };
}

#[expect(non_snake_case, reason = "the macro names values as their types")]
mod impls {
    use super::*;

    handlers! {
        ()
        (A)
        (A, B)
        (A, B, C)
        (A, B, C, D)
        (A, B, C, D, G)
        (A, B, C, D, G, H)
        (A, B, C, D, G, H, I)
        (A, B, C, D, G, H, I, J)
    }
}
