//! What the app's own code asks of the worker from inside its process: a remote control command of the app, a boot step,
//! a signal handler. It comes as [`Order::Inside`](super::hosting::Order::Inside), from the thread of Python.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};
use tokio::sync::oneshot;

use super::consumer::Consumer;
use crate::config::TaskPolicy;
use crate::control::{self, Answer, Request};
use crate::pool::Reload;

/// What is asked.
#[derive(Debug)]
pub enum Inside {
    /// Runs a command of remote control, and waits for its reply: the `repr` of the exception where it fails.
    Command {
        /// Its name.
        method: String,
        /// Its arguments.
        arguments: Map<String, Value>,
        /// Where the reply goes.
        answer: oneshot::Sender<Result<Value, String>>,
    },
    /// So many messages more, or less, may be unsettled.
    Prefetch(i64),
    /// The tasks of the app, after its modules were loaded again.
    Tasks(HashMap<String, TaskPolicy>),
    /// Every child is replaced, by one that has loaded these modules.
    Restart(Reload),
}

impl Consumer {
    pub(super) fn on_inside(&mut self, inside: Inside) {
        match inside {
            Inside::Command { method, arguments, answer } => {
                let request = Request { method, arguments, reply_to: None, ticket: None };
                let told = match control::run(&request, self) {
                    Answer::Reply(value) => Ok(value),
                    // What the app adds it can add itself.
                    Answer::Told(_, figures) => Ok(Value::Object(figures)),
                    Answer::Written(text) => Ok(Value::String(text)),
                    Answer::Raised(exception) => Err(exception),
                    Answer::Silent => Ok(Value::Null),
                    Answer::Consume(queue) => {
                        self.declare(request, queue);
                        Ok(Value::Null)
                    }
                    // It was asked by whom it would ask.
                    Answer::Ask => Err(format!("KeyError('{}')", request.method)),
                };
                // Whoever asked may have gone.
                let _ = answer.send(told);
            }
            Inside::Prefetch(messages) => self.add_prefetch(messages),
            Inside::Tasks(tasks) => self.take_tasks(tasks),
            Inside::Restart(reload) => {
                if let Err(why) = self.pool.restart(reload) {
                    tracing::error!(target: "celery.worker.control", "The pool was not restarted: {why}");
                }
            }
        }
    }

    /// A task that the app has not changed keeps the limits that it was given from afar.
    fn take_tasks(&mut self, tasks: HashMap<String, TaskPolicy>) {
        let before = &self.config.tasks;
        self.rules.tasks.retain(|name, _| tasks.contains_key(name));
        for (name, policy) in &tasks {
            if before.get(name) != Some(policy) {
                self.rules.tasks.insert(name.clone(), Arc::new(policy.clone()));
                self.rate_texts.remove(name);
                self.rate_limits.reset(name);
            }
        }
        self.config.tasks = tasks;
    }
}
