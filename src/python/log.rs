//! Rust's log events as records of Python's `logging`, by way of the hooks' channel.

use std::fmt::{Debug, Write};
use std::sync::mpsc::Sender;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::hooks::Call;
use crate::worker::hooks::LogRecord;

/// Passes events on; spans are not used.
pub(super) struct ToPython {
    calls: Sender<Call>,
    most: Level,
}

impl ToPython {
    /// Events up to `most` of ours, warnings of the libraries.
    pub(super) fn new(calls: Sender<Call>, most: Level) -> Self {
        Self { calls, most }
    }
}

impl Subscriber for ToPython {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("cele");
        // What lapin has to say comes back from it as an error, which is logged once, where it is handled.
        if metadata.target().starts_with("lapin") {
            return false;
        }
        *metadata.level() <= if ours { self.most } else { Level::WARN.min(self.most) }
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let level = match *event.metadata().level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            Level::DEBUG | Level::TRACE => 10,
        };
        let record = LogRecord {
            logger: event.metadata().target(),
            level,
            message: format!("{}{}", line.message, line.fields),
            data: None,
            task: None,
        };
        // The main thread is gone only when the worker is over.
        let _ = self.calls.send(Call::Log(record));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
