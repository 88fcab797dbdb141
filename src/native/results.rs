//! The records of native tasks: documents with the place where they go.

use std::time::Duration;

use bytes::Bytes;
use jiff::tz::TimeZone;

use super::extract::Arguments;
use crate::backend::Record;
use crate::clock;
use crate::protocol::result::{Exception, Extended, Meta, date, is_ready};
use crate::protocol::{DeliveryInfo, Json, TaskHeaders};

/// How results are written, the same for all tasks.
#[derive(Clone, Debug)]
pub(super) struct Results {
    /// `timezone`, of `date_done`.
    pub(super) zone: TimeZone,
    /// Node name.
    pub(super) node: String,
    /// `result_extended`.
    pub(super) extended: bool,
    /// `result_expires`.
    pub(super) expires: Option<Duration>,
    /// Results are messages to the sender's reply queue.
    pub(super) rpc: bool,
}

/// Whose result it is.
pub(super) struct Owner<'a> {
    pub(super) headers: &'a TaskHeaders,
    pub(super) properties: &'a Json,
    pub(super) info: &'a DeliveryInfo,
    pub(super) arguments: Option<&'a Arguments>,
}

impl Results {
    /// A record of a state with its result, JSON text. `None`: there is nowhere to send it.
    pub(super) fn record(
        &self,
        owner: &Owner<'_>,
        state: &str,
        result: &str,
        traceback: Option<&str>,
    ) -> Option<Record> {
        let key = if self.rpc {
            let properties = owner.properties.value().ok()?;
            let reply_to = properties.get("reply_to")?.as_str().filter(|queue| !queue.is_empty())?;
            reply_to.to_owned()
        } else {
            String::new()
        };
        let done = is_ready(state).then(|| date(clock::now(), &self.zone));
        let args = owner.arguments.map(Arguments::args_text);
        let kwargs = owner.arguments.map(Arguments::kwargs_text);
        let document = Meta {
            headers: owner.headers,
            state,
            result,
            traceback,
            date_done: done.as_deref(),
            extended: self.extended.then(|| Extended {
                args: args.as_deref(),
                kwargs: kwargs.as_deref(),
                worker: &self.node,
                queue: &owner.info.routing_key,
            }),
        }
        .document();
        Some(Record {
            task_id: owner.headers.id.clone(),
            state: state.to_owned(),
            document: Bytes::from(document),
            key,
            expires: self.expires,
            content_type: "application/json".to_owned(),
            content_encoding: "utf-8".to_owned(),
        })
    }

    /// A record of an exception.
    pub(super) fn raised(
        &self,
        owner: &Owner<'_>,
        state: &str,
        exception: &Exception,
        traceback: Option<&str>,
    ) -> Option<Record> {
        self.record(owner, state, &exception.document(), traceback)
    }
}
