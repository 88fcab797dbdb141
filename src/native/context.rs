//! What a handler may know of its request: Python's `self.request`.

use serde_json::Value;

use super::extract::{Call, FromTask, Rejection};
use crate::protocol::{DeliveryInfo, Json};

/// The request that a handler serves; an extractor.
#[derive(Clone, Debug)]
pub struct TaskContext {
    /// Task id.
    pub id: String,
    /// Name of the task.
    pub task: String,
    /// How often it was retried.
    pub retries: i64,
    /// Id of the first task of the workflow.
    pub root_id: Option<String>,
    /// Id of the task that sent this one.
    pub parent_id: Option<String>,
    /// Id of the group that it is a member of.
    pub group_id: Option<String>,
    /// Where it came from.
    pub delivery_info: DeliveryInfo,
    /// Name of the node.
    pub hostname: String,
    pub(super) headers: Json,
}

impl TaskContext {
    /// A header of the message, one of the sender's own included.
    pub fn header(&self, name: &str) -> Option<Value> {
        self.headers.value().ok()?.get(name).cloned()
    }
}

impl FromTask for TaskContext {
    fn from_task(call: &Call) -> Result<Self, Rejection> {
        Ok(call.context.clone())
    }
}
