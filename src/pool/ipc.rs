//! Frames between the supervisor and a child, over a stream socket.
//!
//! `u32 length (little endian, of what follows) · u8 kind · fields`. A field of bytes or text is a `u32` length
//! and the bytes; numbers are little endian; an optional field is a `u8` 0 or 1 and then the field. Both ends
//! are of one build, so there is no version. Reading is total: whatever arrives gives a frame or a
//! [`FrameError`], never a panic.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Hints, Job, JobId, Outcome, Work};
use crate::backend::{Counted, Part, Record};
use crate::broker::Publication;
use crate::protocol::{DeliveryInfo, Json, Message};

/// Longest frame that is believed: Redis holds values up to 512 MiB, base64 and headers included.
pub const MAX_FRAME: usize = 1 << 30;

/// What the supervisor writes to a child.
#[derive(Debug)]
pub enum ToChild {
    /// Run this.
    Run(Box<Job>),
    /// A store that was waited for is done, or failed with this text.
    Stored {
        /// The child's number for it.
        serial: u64,
        /// The error to raise.
        error: Option<String>,
    },
    /// A member of a chord was counted.
    Counted {
        /// The child's number for it.
        serial: u64,
        /// The answer.
        counted: Counted,
    },
    /// End one of many jobs before its time. Only for children with an event loop: others are signalled.
    Cancel {
        /// Which.
        job: JobId,
        /// Its soft limit has passed; else it is cancelled, and what it still says is not wanted.
        soft: bool,
    },
    /// End this job, in a child of greenlets: it has passed this hard limit or, without one, was revoked or cancelled.
    Interrupt {
        /// Which.
        job: JobId,
        /// The limit, seconds.
        limit: Option<f64>,
    },
    /// Leave through the exit hooks.
    Stop,
    /// The same, to be replaced: exit status 155.
    Recycle,
}

/// What a child writes to the supervisor.
#[derive(Debug)]
pub enum FromChild {
    /// Initialized; takes jobs.
    Up {
        /// Its pid.
        pid: u32,
    },
    /// Decoded the job and starts it.
    Accepted {
        /// Which.
        job: JobId,
    },
    /// Write this result.
    Store {
        /// The job that asks, 0 outside of one.
        job: JobId,
        /// The child's number for it when it waits for the answer.
        confirm: Option<u64>,
        /// What to write.
        record: Record,
    },
    /// A call answered; `Ended` follows.
    Answered {
        /// Which.
        job: JobId,
        /// What it answered.
        value: Bytes,
    },
    /// Count the job as a member of its chord; the child waits.
    Part {
        /// The job.
        job: JobId,
        /// The child's number for it.
        serial: u64,
        /// What to count.
        part: Part,
    },
    /// Publish what continues the job: its callback, or the next step of its chain.
    Publish {
        /// The job that is continued, 0 outside of one.
        job: JobId,
        /// The child's number for it when it waits for the broker's word.
        confirm: Option<u64>,
        /// The message and where it goes.
        publication: Box<Publication>,
    },
    /// The job ended.
    Ended {
        /// Which.
        job: JobId,
        /// How.
        outcome: Outcome,
    },
}

/// Bytes that are no frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    #[error("a frame of {0} bytes is longer than any message")]
    TooLong(usize),
    /// An unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A field runs past the end of the frame, or is not text where text is due.
    #[error("broken frame: {0}")]
    Field(&'static str),
}

/// Takes the payload of the first whole frame off the buffer, if there is one.
///
/// # Errors
/// [`FrameError::TooLong`]; the stream cannot be used any more.
pub fn split(buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let Some(prefix) = buffer.get(..4) else { return Ok(None) };
    let length = u32::from_le_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    if buffer.len() < 4 + length {
        buffer.reserve(4 + length - buffer.len());
        return Ok(None);
    }
    buffer.advance(4);
    Ok(Some(buffer.split_to(length).freeze()))
}

impl ToChild {
    /// Appends the frame.
    pub fn encode(&self, out: &mut BytesMut) {
        frame(out, |out| match self {
            Self::Run(job) => put_job(out, job),
            Self::Stored { serial, error } => {
                out.put_u8(2);
                out.put_u64_le(*serial);
                put_option(out, error.as_ref().map(String::as_bytes));
            }
            Self::Stop => out.put_u8(3),
            Self::Recycle => out.put_u8(4),
            Self::Cancel { job, soft } => {
                out.put_u8(16);
                out.put_u64_le(*job);
                out.put_u8(u8::from(*soft));
            }
            Self::Counted { serial, counted } => {
                out.put_u8(5);
                out.put_u64_le(*serial);
                out.put_i64_le(counted.ready);
                for number in [counted.added, counted.size] {
                    out.put_u8(u8::from(number.is_some()));
                    out.put_i64_le(number.unwrap_or_default());
                }
                out.put_u8(u8::from(counted.sends));
            }
            Self::Interrupt { job, limit } => {
                out.put_u8(6);
                out.put_u64_le(*job);
                out.put_u8(u8::from(limit.is_some()));
                out.put_f64_le(limit.unwrap_or_default());
            }
        });
    }

    /// Appends the frame of [`ToChild::Run`] for a job that the caller keeps.
    pub fn encode_run(job: &Job, out: &mut BytesMut) {
        frame(out, |out| put_job(out, job));
    }

    /// Reads a payload given by [`split`].
    ///
    /// # Errors
    /// When it is no frame of this direction.
    pub fn decode(payload: Bytes) -> Result<Self, FrameError> {
        let mut fields = Fields(payload);
        Ok(match fields.u8()? {
            1 => Self::Run(Box::new(Job {
                id: fields.u64()?,
                task: fields.text()?,
                task_id: fields.text()?,
                headers: Json(fields.bytes()?),
                properties: Json(fields.bytes()?),
                info: DeliveryInfo {
                    exchange: fields.text()?,
                    routing_key: fields.text()?,
                    queue: fields.text()?,
                    redelivered: fields.u8()? != 0,
                },
                body: fields.bytes()?,
                content_type: fields.text()?,
                content_encoding: fields.text()?,
                acks_early: fields.u8()? != 0,
                work: if fields.u8()? == 0 { Work::Message } else { Work::Call },
                hints: Hints::of_bits(fields.u8()?),
            })),
            2 => Self::Stored { serial: fields.u64()?, error: fields.optional_text()? },
            3 => Self::Stop,
            4 => Self::Recycle,
            16 => Self::Cancel { job: fields.u64()?, soft: fields.u8()? != 0 },
            5 => Self::Counted {
                serial: fields.u64()?,
                counted: Counted {
                    ready: fields.i64()?,
                    added: fields.optional(Fields::i64)?,
                    size: fields.optional(Fields::i64)?,
                    sends: fields.u8()? != 0,
                },
            },
            6 => Self::Interrupt { job: fields.u64()?, limit: fields.optional(Fields::f64)? },
            kind => return Err(FrameError::Kind(kind)),
        })
    }
}

impl FromChild {
    /// Appends the frame.
    pub fn encode(&self, out: &mut BytesMut) {
        frame(out, |out| match self {
            Self::Up { pid } => {
                out.put_u8(1);
                out.put_u32_le(*pid);
            }
            Self::Accepted { job } => {
                out.put_u8(2);
                out.put_u64_le(*job);
            }
            Self::Store { job, confirm, record } => {
                out.put_u8(3);
                out.put_u64_le(*job);
                out.put_u8(u8::from(confirm.is_some()));
                out.put_u64_le(confirm.unwrap_or(0));
                put(out, record.task_id.as_bytes());
                put(out, record.state.as_bytes());
                put(out, &record.document);
                put(out, record.key.as_bytes());
                out.put_u8(u8::from(record.expires.is_some()));
                out.put_f64_le(record.expires.unwrap_or_default().as_secs_f64());
                put(out, record.content_type.as_bytes());
                put(out, record.content_encoding.as_bytes());
            }
            Self::Answered { job, value } => {
                out.put_u8(5);
                out.put_u64_le(*job);
                put(out, value);
            }
            Self::Ended { job, outcome } => {
                out.put_u8(4);
                out.put_u64_le(*job);
                put_outcome(out, outcome);
            }
            Self::Part { job, serial, part } => {
                out.put_u8(6);
                out.put_u64_le(*job);
                out.put_u64_le(*serial);
                for texts in [&part.keys, &part.arguments] {
                    out.put_u8(u8::try_from(texts.len()).unwrap_or(u8::MAX));
                    for text in texts {
                        put(out, text);
                    }
                }
            }
            Self::Publish { job, confirm, publication } => {
                out.put_u8(7);
                out.put_u64_le(*job);
                out.put_u8(u8::from(confirm.is_some()));
                out.put_u64_le(confirm.unwrap_or(0));
                put_publication(out, publication);
            }
        });
    }

    /// Reads a payload given by [`split`].
    ///
    /// # Errors
    /// When it is no frame of this direction.
    pub fn decode(payload: Bytes) -> Result<Self, FrameError> {
        let mut fields = Fields(payload);
        Ok(match fields.u8()? {
            1 => Self::Up { pid: fields.u32()? },
            2 => Self::Accepted { job: fields.u64()? },
            3 => Self::Store {
                job: fields.u64()?,
                confirm: fields.optional(Fields::u64)?,
                record: Record {
                    task_id: fields.text()?,
                    state: fields.text()?,
                    document: fields.bytes()?,
                    key: fields.text()?,
                    expires: fields.optional(Fields::f64)?.map(seconds),
                    content_type: fields.text()?,
                    content_encoding: fields.text()?,
                },
            },
            4 => Self::Ended { job: fields.u64()?, outcome: take_outcome(&mut fields)? },
            5 => Self::Answered { job: fields.u64()?, value: fields.bytes()? },
            6 => Self::Part {
                job: fields.u64()?,
                serial: fields.u64()?,
                part: Part { keys: fields.several()?, arguments: fields.several()? },
            },
            7 => Self::Publish {
                job: fields.u64()?,
                confirm: fields.optional(Fields::u64)?,
                publication: Box::new(take_publication(&mut fields)?),
            },
            kind => return Err(FrameError::Kind(kind)),
        })
    }
}

fn put_job(out: &mut BytesMut, job: &Job) {
    out.put_u8(1);
    out.put_u64_le(job.id);
    put(out, job.task.as_bytes());
    put(out, job.task_id.as_bytes());
    put(out, job.headers.as_bytes());
    put(out, job.properties.as_bytes());
    put(out, job.info.exchange.as_bytes());
    put(out, job.info.routing_key.as_bytes());
    put(out, job.info.queue.as_bytes());
    out.put_u8(u8::from(job.info.redelivered));
    put(out, &job.body);
    put(out, job.content_type.as_bytes());
    put(out, job.content_encoding.as_bytes());
    out.put_u8(u8::from(job.acks_early));
    out.put_u8(u8::from(job.work == Work::Call));
    out.put_u8(job.hints.bits());
}

fn put_publication(out: &mut BytesMut, publication: &Publication) {
    let Publication { exchange, exchange_type, routing_key, message, declare } = publication;
    let queue = declare.as_ref().and_then(|queue| serde_json::to_vec(&**queue).ok());
    put(out, exchange.as_bytes());
    put_option(out, exchange_type.as_ref().map(String::as_bytes));
    put(out, routing_key.as_bytes());
    put_option(out, queue.as_deref());
    put_option(out, message.content_type.as_ref().map(String::as_bytes));
    put_option(out, message.content_encoding.as_ref().map(String::as_bytes));
    put(out, message.headers.as_bytes());
    put(out, message.properties.as_bytes());
    put(out, &message.body);
}

fn take_publication(fields: &mut Fields) -> Result<Publication, FrameError> {
    let exchange = fields.text()?;
    let exchange_type = fields.optional_text()?;
    let routing_key = fields.text()?;
    let queue = fields.optional_text()?.map(|queue| serde_json::from_str(&queue)).transpose();
    Ok(Publication {
        exchange,
        exchange_type,
        routing_key,
        declare: queue.map_err(|_| FrameError::Field("queue"))?.map(Arc::new),
        message: Message {
            content_type: fields.optional_text()?,
            content_encoding: fields.optional_text()?,
            headers: Json(fields.bytes()?),
            properties: Json(fields.bytes()?),
            body: fields.bytes()?,
        },
    })
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or_default()
}

fn put_outcome(out: &mut BytesMut, outcome: &Outcome) {
    match outcome {
        Outcome::Success { result, runtime } => {
            out.put_u8(1);
            put(out, result.as_bytes());
            out.put_f64_le(*runtime);
        }
        Outcome::Failure { exception, traceback, runtime } => {
            out.put_u8(2);
            put(out, exception.as_bytes());
            put(out, traceback.as_bytes());
            out.put_f64_le(*runtime);
        }
        Outcome::Retry { exception, traceback } => {
            out.put_u8(3);
            put(out, exception.as_bytes());
            put(out, traceback.as_bytes());
        }
        Outcome::Ignored => out.put_u8(4),
        Outcome::Rejected { requeue, exception, traceback } => {
            out.put_u8(5);
            out.put_u8(u8::from(*requeue));
            put(out, exception.as_bytes());
            put(out, traceback.as_bytes());
        }
        Outcome::Undecodable { reason } => {
            out.put_u8(6);
            put(out, reason.as_bytes());
        }
        Outcome::Malformed { reason } => {
            out.put_u8(7);
            put_option(out, reason.as_ref().map(String::as_bytes));
        }
        Outcome::WorkerLost { status } => {
            out.put_u8(8);
            put(out, status.as_bytes());
        }
        Outcome::TimedOut { limit } => {
            out.put_u8(9);
            out.put_f64_le(*limit);
        }
        Outcome::Terminated => out.put_u8(10),
        Outcome::Translated { headers, body, content_type, content_encoding } => {
            out.put_u8(11);
            put(out, headers.as_bytes());
            put(out, body);
            put(out, content_type.as_bytes());
            put(out, content_encoding.as_bytes());
        }
    }
}

fn take_outcome(fields: &mut Fields) -> Result<Outcome, FrameError> {
    Ok(match fields.u8()? {
        1 => Outcome::Success { result: fields.text()?, runtime: fields.f64()? },
        2 => {
            Outcome::Failure { exception: fields.text()?, traceback: fields.text()?, runtime: fields.f64()? }
        }
        3 => Outcome::Retry { exception: fields.text()?, traceback: fields.text()? },
        4 => Outcome::Ignored,
        5 => Outcome::Rejected {
            requeue: fields.u8()? != 0,
            exception: fields.text()?,
            traceback: fields.text()?,
        },
        6 => Outcome::Undecodable { reason: fields.text()? },
        7 => Outcome::Malformed { reason: fields.optional_text()? },
        8 => Outcome::WorkerLost { status: fields.text()? },
        9 => Outcome::TimedOut { limit: fields.f64()? },
        10 => Outcome::Terminated,
        11 => Outcome::Translated {
            headers: Json(fields.bytes()?),
            body: fields.bytes()?,
            content_type: fields.text()?,
            content_encoding: fields.text()?,
        },
        _ => return Err(FrameError::Field("outcome")),
    })
}

fn frame(out: &mut BytesMut, fields: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u32_le(0);
    fields(out);
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

fn put(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32_le(bytes.len() as u32);
    out.put_slice(bytes);
}

fn put_option(out: &mut BytesMut, bytes: Option<&[u8]>) {
    out.put_u8(u8::from(bytes.is_some()));
    put(out, bytes.unwrap_or_default());
}

struct Fields(Bytes);

impl Fields {
    fn need(&self, count: usize) -> Result<(), FrameError> {
        if self.0.len() < count { Err(FrameError::Field("too short")) } else { Ok(()) }
    }

    fn u8(&mut self) -> Result<u8, FrameError> {
        self.need(1)?;
        Ok(self.0.get_u8())
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        self.need(4)?;
        Ok(self.0.get_u32_le())
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        self.need(8)?;
        Ok(self.0.get_u64_le())
    }

    fn i64(&mut self) -> Result<i64, FrameError> {
        self.need(8)?;
        Ok(self.0.get_i64_le())
    }

    fn several(&mut self) -> Result<Vec<Bytes>, FrameError> {
        (0..self.u8()?).map(|_| self.bytes()).collect()
    }

    fn f64(&mut self) -> Result<f64, FrameError> {
        self.need(8)?;
        Ok(self.0.get_f64_le())
    }

    fn bytes(&mut self) -> Result<Bytes, FrameError> {
        let length = self.u32()? as usize;
        self.need(length)?;
        Ok(self.0.split_to(length))
    }

    fn text(&mut self) -> Result<String, FrameError> {
        String::from_utf8(self.bytes()?.into()).map_err(|_| FrameError::Field("not text"))
    }

    fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, FrameError>,
    ) -> Result<Option<T>, FrameError> {
        let present = self.u8()? != 0;
        let value = read(self)?;
        Ok(present.then_some(value))
    }

    fn optional_text(&mut self) -> Result<Option<String>, FrameError> {
        self.optional(Self::text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::topology::Queue;

    fn there_and_back(frame: &FromChild) -> FromChild {
        let mut buffer = BytesMut::new();
        frame.encode(&mut buffer);
        let payload = split(&mut buffer).unwrap().unwrap();
        assert!(buffer.is_empty());
        FromChild::decode(payload).unwrap()
    }

    #[test]
    fn every_outcome_survives_the_pipe() {
        for outcome in [
            Outcome::Success { result: "10".into(), runtime: 0.25 },
            Outcome::Failure { exception: "KeyError('x')".into(), traceback: "…".into(), runtime: 1.0 },
            Outcome::Retry { exception: "E()".into(), traceback: String::new() },
            Outcome::Ignored,
            Outcome::Rejected { requeue: true, exception: "r".into(), traceback: "t".into() },
            Outcome::Undecodable { reason: "bad".into() },
            Outcome::Malformed { reason: Some("bad".into()) },
            Outcome::Malformed { reason: None },
            Outcome::Translated {
                headers: Json::empty(),
                body: Bytes::from_static(b"\x80\x02"),
                content_type: "application/x-python-serialize".into(),
                content_encoding: "binary".into(),
            },
            Outcome::WorkerLost { status: "signal 9 (SIGKILL)".into() },
            Outcome::TimedOut { limit: 2.5 },
            Outcome::Terminated,
        ] {
            let frame = FromChild::Ended { job: 7, outcome: outcome.clone() };
            match there_and_back(&frame) {
                FromChild::Ended { job: 7, outcome: back } => assert_eq!(back, outcome),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_member_of_a_chord_and_the_answer_survive_the_pipe() {
        let part = Part { keys: vec![Bytes::from_static(b"g.j")], arguments: vec![Bytes::new(), "1".into()] };
        match there_and_back(&FromChild::Part { job: 1, serial: 2, part: part.clone() }) {
            FromChild::Part { job: 1, serial: 2, part: back } => assert_eq!(back, part),
            other => panic!("{other:?}"),
        }
        let answer = Counted { ready: -1, added: None, size: Some(3), sends: true };
        let mut buffer = BytesMut::new();
        ToChild::Counted { serial: 2, counted: answer }.encode(&mut buffer);
        match ToChild::decode(split(&mut buffer).unwrap().unwrap()).unwrap() {
            ToChild::Counted { serial: 2, counted } => assert_eq!(counted, answer),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_publication_survives_the_pipe() {
        let message = Message {
            content_type: Some("application/json".into()),
            content_encoding: None,
            headers: Json(Bytes::from_static(br#"{"task": "add"}"#)),
            properties: Json::empty(),
            body: Bytes::from_static(b"[[], {}, {}]"),
        };
        let publication = Publication {
            exchange: "e".into(),
            exchange_type: None,
            routing_key: "k".into(),
            message,
            declare: Some(Arc::new(Queue::named("q"))),
        };
        let frame =
            FromChild::Publish { job: 9, confirm: Some(3), publication: Box::new(publication.clone()) };
        match there_and_back(&frame) {
            FromChild::Publish { job: 9, confirm: Some(3), publication: back } => {
                assert_eq!(format!("{back:?}"), format!("{publication:?}"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_record_survives_the_pipe() {
        let record = Record {
            task_id: "id".into(),
            state: "SUCCESS".into(),
            document: Bytes::from_static(b"{}"),
            key: "celery-task-meta-id".into(),
            expires: Some(Duration::from_millis(1500)),
            content_type: "application/json".into(),
            content_encoding: "utf-8".into(),
        };
        let frame = FromChild::Store { job: 1, confirm: None, record: record.clone() };
        match there_and_back(&frame) {
            FromChild::Store { job: 1, confirm: None, record: back } => assert_eq!(back, record),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_call_and_its_answer_survive_the_pipe() {
        let job = Job {
            id: 9,
            task: "add".into(),
            task_id: String::new(),
            headers: Json::empty(),
            properties: Json::empty(),
            info: DeliveryInfo::default(),
            body: Bytes::from_static(b"\x80\x05"),
            content_type: String::new(),
            content_encoding: String::new(),
            acks_early: true,
            work: Work::Call,
            hints: Hints::default(),
        };
        let every = [None, Some(false), Some(true)]
            .into_iter()
            .flat_map(|ignore_result| [false, true].map(|related| (ignore_result, related)))
            .flat_map(|(ignore_result, related)| {
                [false, true].map(|compressed| Hints { ignore_result, related, compressed })
            });
        for hints in every {
            let mut buffer = BytesMut::new();
            ToChild::encode_run(&Job { hints, ..job.clone() }, &mut buffer);
            match ToChild::decode(split(&mut buffer).unwrap().unwrap()).unwrap() {
                ToChild::Run(back) => {
                    assert_eq!((back.work, &back.body, back.hints), (Work::Call, &job.body, hints));
                }
                other => panic!("{other:?}"),
            }
        }
        let value = Bytes::from_static(b"N.");
        match there_and_back(&FromChild::Answered { job: 9, value: value.clone() }) {
            FromChild::Answered { job: 9, value: back } => assert_eq!(back, value),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_cancellation_survives_the_pipe() {
        let mut buffer = BytesMut::new();
        ToChild::Cancel { job: 7, soft: true }.encode(&mut buffer);
        let back = ToChild::decode(split(&mut buffer).unwrap().unwrap()).unwrap();
        assert!(matches!(back, ToChild::Cancel { job: 7, soft: true }), "{back:?}");
    }

    #[test]
    fn the_end_of_a_job_that_is_asked_for_survives_the_pipe() {
        for asked in [None, Some(2.5)] {
            let mut buffer = BytesMut::new();
            ToChild::Interrupt { job: 9, limit: asked }.encode(&mut buffer);
            match ToChild::decode(split(&mut buffer).unwrap().unwrap()).unwrap() {
                ToChild::Interrupt { job: 9, limit } => assert_eq!(limit, asked),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_frame_cut_anywhere_is_waited_for_and_no_prefix_of_a_payload_panics() {
        let mut whole = BytesMut::new();
        FromChild::Ended { job: 1, outcome: Outcome::Ignored }.encode(&mut whole);
        for cut in 0..whole.len() {
            let mut part = BytesMut::from(&whole[..cut]);
            assert_eq!(split(&mut part).unwrap(), None);
        }
        let payload = split(&mut whole).unwrap().unwrap();
        for cut in 0..payload.len() {
            assert!(FromChild::decode(payload.slice(..cut)).is_err());
        }
    }

    #[test]
    fn an_absurd_length_is_refused() {
        let mut buffer = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        assert_eq!(split(&mut buffer), Err(FrameError::TooLong(u32::MAX as usize)));
    }
}
