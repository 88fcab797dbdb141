//! A request: a delivery accepted for a known task.

use std::sync::Arc;

use crate::broker::{Delivery, Handle};
use crate::config::TaskPolicy;
use crate::metrics::SeriesId;
use crate::pool::{Hints, Job, JobId, Work};
use crate::protocol::{DeliveryInfo, Message, TaskHeaders};

use super::hosting::Ticket;

/// A delivery accepted for a known task. It owns the handle: whoever holds the request settles it.
#[derive(Debug)]
pub struct Request {
    /// What the supervisor reads of the headers.
    pub headers: Box<TaskHeaders>,
    /// The message.
    pub message: Message,
    /// Where it came from.
    pub info: DeliveryInfo,
    /// Settles it.
    pub handle: Handle,
    /// What the task's attributes say.
    pub policy: Arc<TaskPolicy>,
    /// Not before, seconds since the epoch.
    pub eta: Option<f64>,
    /// Not after, seconds since the epoch.
    pub expires: Option<f64>,
    /// A child died before it accepted the job; the next time the job is lost.
    pub bounced: bool,
    /// Its number in the books of [`super::hosting`], where Python has an object for it.
    pub ticket: Option<Ticket>,
    /// Where it is counted; none before its task is known.
    pub series: Option<SeriesId>,
}

impl Request {
    /// A message of protocol 1 that a child has to decode before anything can be said of it: a job without a name.
    /// It is settled when the child has answered, so it counts as one that is acknowledged late.
    pub fn untranslated(delivery: Delivery) -> Self {
        Self {
            headers: Box::default(),
            message: delivery.message,
            info: delivery.info,
            handle: delivery.handle,
            policy: Arc::new(TaskPolicy { acks_late: true, ..TaskPolicy::default() }),
            eta: None,
            expires: None,
            bounced: false,
            ticket: None,
            series: None,
        }
    }

    /// Whether it is one of those.
    pub fn is_untranslated(&self) -> bool {
        self.headers.task.is_empty()
    }

    /// The job for the pool. `tells`: whether events of tasks are sent.
    pub fn job(&self, id: JobId, tells: bool) -> Job {
        Job {
            id,
            task: self.headers.task.clone(),
            task_id: self.headers.id.clone(),
            headers: self.message.headers.clone(),
            properties: self.message.properties.clone(),
            info: self.info.clone(),
            body: self.message.body.clone(),
            content_type: self.message.content_type.clone().unwrap_or_else(|| DATA.to_owned()),
            content_encoding: self.message.content_encoding.clone().unwrap_or_else(|| "utf-8".to_owned()),
            acks_early: !self.policy.acks_late || (tells && self.policy.send_events),
            work: Work::Message,
            hints: self.hints(),
        }
    }

    fn hints(&self) -> Hints {
        let headers = &self.headers;
        Hints {
            ignore_result: headers.ignore_result,
            related: headers.parent_id.is_some() || headers.group.is_some(),
            compressed: headers.compression.is_some(),
        }
    }

    /// `name[id]`, as log lines show a task.
    pub fn human(&self) -> String {
        format!("{}[{}]", self.headers.display_name(), self.headers.id)
    }

    /// A limit as Celery shows it: those of the command line are floating point numbers.
    pub fn limit_text(&self, seconds: f64) -> String {
        let (limit, policy) = (self.headers.timelimit, &self.policy);
        let given = [limit.hard, limit.soft, policy.time_limit, policy.soft_time_limit];
        if given.contains(&Some(seconds)) { format!("{seconds}") } else { format!("{seconds:?}") }
    }

    /// Limits: the message's, else the task's, else the worker's; a limit of 0 is none.
    pub fn limits(&self, worker: (Option<f64>, Option<f64>)) -> (Option<f64>, Option<f64>) {
        let pick = |choices: [Option<f64>; 3]| choices.into_iter().flatten().find(|limit| *limit > 0.0);
        (
            pick([self.headers.timelimit.hard, self.policy.time_limit, worker.0]),
            pick([self.headers.timelimit.soft, self.policy.soft_time_limit, worker.1]),
        )
    }
}

/// The content type of a message that names none, as kombu has it.
pub const DATA: &str = "application/data";
