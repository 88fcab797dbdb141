//! Celery's line for each received task, written without Python: as text, or as JSON like that of
//! `python/celeriac/json_lines.py`.
//!
//! Only where nobody could tell: `python/celeriac/lines.py` checks that the app left logging as Celery sets it up.
//! Elsewhere the line is a record of Python's `logging` like all others.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Deserialize;
use serde_json::json;

use crate::clock;
use crate::worker::hooks::LogRecord;

/// How and where lines are written.
#[derive(Clone, Debug, Deserialize)]
pub struct LineConfig {
    /// `worker_log_format`.
    pub format: String,
    /// The log file; none: standard error.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// One JSON object a line, whatever the format.
    #[serde(default)]
    pub json: bool,
}

/// A `%`-style format of Python's logging, of the keys that a line without Python can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineFormat(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Time,
    Level,
    Process,
    ProcessId,
    Name,
    Message,
}

impl LineFormat {
    /// Reads a format. `None`: it has a key that only a record of Python's has.
    pub fn parse(format: &str) -> Option<Self> {
        let mut pieces = Vec::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            if at > 0 {
                pieces.push(Piece::Text(rest[..at].to_owned()));
            }
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                pieces.push(Piece::Text("%".to_owned()));
                rest = after;
                continue;
            }
            let (key, after) = rest.strip_prefix('(')?.split_once(')')?;
            let (piece, kind) = match key {
                "asctime" => (Piece::Time, 's'),
                "levelname" => (Piece::Level, 's'),
                "processName" => (Piece::Process, 's'),
                "process" => (Piece::ProcessId, 'd'),
                "name" => (Piece::Name, 's'),
                "message" => (Piece::Message, 's'),
                _ => return None,
            };
            rest = after.strip_prefix(kind)?;
            pieces.push(piece);
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Some(Self(pieces))
    }

    /// The line of an INFO record of the main process at a moment, with its end.
    fn line(&self, now: f64, zone: &TimeZone, logger: &str, message: &str) -> String {
        let mut line = String::with_capacity(96 + message.len());
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => line.push_str(text),
                Piece::Time => line.push_str(&asctime(now, zone)),
                Piece::Level => line.push_str("INFO"),
                Piece::Process => line.push_str("MainProcess"),
                Piece::ProcessId => line.push_str(&std::process::id().to_string()),
                Piece::Name => line.push_str(logger),
                Piece::Message => line.push_str(message),
            }
        }
        line.push('\n');
        line
    }
}

/// `2026-11-22 09:51:26,150`, as Python's logging prints a time without a format of its own.
fn asctime(now: f64, zone: &TimeZone) -> String {
    let millis = (now * 1000.0) as i64;
    let moment = Timestamp::from_millisecond(millis).unwrap_or_default().to_zoned(zone.clone());
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02},{:03}",
        moment.year(),
        moment.month(),
        moment.day(),
        moment.hour(),
        moment.minute(),
        moment.second(),
        millis.rem_euclid(1000)
    )
}

/// Writes lines, each in one go, so that those of other processes stay whole.
#[derive(Debug)]
pub struct LineWriter {
    /// None: JSON.
    format: Option<LineFormat>,
    zone: TimeZone,
    target: Target,
}

#[derive(Debug)]
enum Target {
    Stderr,
    File { path: PathBuf, open: Option<(File, (u64, u64))> },
}

impl LineWriter {
    /// A writer; `None` where the format has keys that only Python knows.
    pub fn new(config: &LineConfig) -> Option<Self> {
        let target = match &config.path {
            None => Target::Stderr,
            Some(path) => Target::File { path: path.clone(), open: None },
        };
        let format = if config.json { None } else { Some(LineFormat::parse(&config.format)?) };
        Some(Self { format, zone: TimeZone::system(), target })
    }

    /// Writes the line of an INFO record. A file that was moved away is opened anew, as Celery's handler does.
    ///
    /// # Errors
    /// When the file cannot be opened or written.
    pub fn info(&mut self, record: &LogRecord) -> io::Result<()> {
        let line = match &self.format {
            Some(format) => format.line(clock::now(), &self.zone, record.logger, &record.message),
            None => json_line(clock::now(), record),
        };
        match &mut self.target {
            Target::Stderr => io::stderr().lock().write_all(line.as_bytes()),
            Target::File { path, open } => {
                let there = std::fs::metadata(&*path).ok().map(|found| (found.dev(), found.ino()));
                if open.as_ref().map(|(_, identity)| *identity) != there {
                    *open = None;
                }
                if open.is_none() {
                    let file = OpenOptions::new().append(true).create(true).mode(0o666).open(&*path)?;
                    let found = file.metadata()?;
                    *open = Some((file, (found.dev(), found.ino())));
                }
                match open {
                    Some((file, _)) => file.write_all(line.as_bytes()),
                    None => Ok(()),
                }
            }
        }
    }
}

/// An INFO record of the main process as JSON, with its end.
fn json_line(now: f64, record: &LogRecord) -> String {
    let moment = Timestamp::from_microsecond((now * 1e6) as i64).unwrap_or_default();
    let mut fields = json!({
        "timestamp": format!("{moment:.6}"),
        "level": "INFO",
        "logger": record.logger,
        "message": record.message,
        "process": "MainProcess",
        "pid": std::process::id(),
    });
    if let Some(task) = &record.task {
        fields["task_name"] = json!(task.task);
        fields["task_id"] = json!(task.id);
        fields["root_id"] = json!(task.root_id);
        fields["parent_id"] = json!(task.parent_id);
        if let Some((trace, span)) = task.traceparent.as_deref().and_then(trace_ids) {
            fields["trace_id"] = json!(trace);
            fields["span_id"] = json!(span);
        }
    }
    if let Some(data) = &record.data {
        fields["data"] = data.clone();
    }
    format!("{fields}\n")
}

/// Trace and span of a `traceparent` of the W3C; none where it is not one.
fn trace_ids(traceparent: &str) -> Option<(&str, &str)> {
    let mut parts = traceparent.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|one| matches!(one, b'0'..=b'9' | b'a'..=b'f'))
    };
    let there = |text: &str| text.bytes().any(|one| one != b'0');
    let right = is_hex(version, 2) && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2);
    (right && version != "ff" && there(trace) && there(span)).then_some((trace, span))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::hooks::About;

    fn record(message: &str) -> LogRecord {
        LogRecord { logger: "x", level: 20, message: message.to_owned(), data: None, task: None }
    }

    const DEFAULT: &str = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s";

    #[test]
    fn a_line_is_celerys_to_the_letter() {
        let format = LineFormat::parse(DEFAULT).unwrap();
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let line =
            format.line(1_795_341_086.150_9, &berlin, "celery.worker.strategy", "Task add[1] received");
        assert_eq!(line, "[2026-11-22 10:51:26,150: INFO/MainProcess] Task add[1] received\n");
    }

    #[test]
    fn a_line_of_json_says_what_task_it_is_about_and_in_which_trace() {
        let task = About {
            task: "add".to_owned(),
            id: "1".to_owned(),
            root_id: Some("0".to_owned()),
            parent_id: None,
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
        };
        let record =
            LogRecord { data: Some(json!({"name": "add"})), task: Some(Box::new(task)), ..record("a\nb") };
        let line = json_line(1_795_341_086.150_9, &record);
        assert_eq!(line.matches('\n').count(), 1);
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        let expected = json!({
            "timestamp": "2026-11-22T09:51:26.150900Z",
            "level": "INFO", "logger": "x", "message": "a\nb", "process": "MainProcess", "pid": std::process::id(),
            "task_name": "add", "task_id": "1", "root_id": "0", "parent_id": null,
            "trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331",
            "data": {"name": "add"},
        });
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_no_traceparent_has_no_trace() {
        for text in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        ] {
            assert_eq!(trace_ids(text), None, "{text}");
        }
    }

    #[test]
    fn a_key_that_only_python_knows_or_a_width_is_left_to_python() {
        assert!(LineFormat::parse("%(levelname)s 100%% %(process)d %(name)s %(message)s").is_some());
        for format in ["%(task_id)s", "%(levelname)-8s", "%(process)s", "%s", "%(message"] {
            assert_eq!(LineFormat::parse(format), None, "{format}");
        }
    }

    #[test]
    fn a_file_that_was_moved_away_is_opened_anew() {
        let folder = std::env::temp_dir().join(format!("celeriac-lines-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("worker.log");
        let config = LineConfig { format: "%(message)s".to_owned(), path: Some(path.clone()), json: false };
        let mut writer = LineWriter::new(&config).unwrap();
        writer.info(&record("one")).unwrap();
        std::fs::rename(&path, folder.join("worker.log.1")).unwrap();
        writer.info(&record("two")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two\n");
        assert_eq!(std::fs::read_to_string(folder.join("worker.log.1")).unwrap(), "one\n");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
