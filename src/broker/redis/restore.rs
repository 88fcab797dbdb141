//! Messages go back from `unacked` into their queues: given back, requeued, overdue, or left by a dead worker.

use redis::Value;

use super::batch::Batch;
use super::link::{BURY, Call, Link, RESTORE};
use super::routes::Routes;
use super::shared::Shared;
use crate::broker::envelope::{self, Record};
use crate::error::BrokerError;

/// Most records read, and messages pushed, in one go.
const BATCH: usize = 128;

/// Which end of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Taken next.
    Head,
    /// Behind all that wait, where kombu puts what is rejected with `requeue`.
    Tail,
}

/// What must still be true in the moment in which a message is moved.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Guard<'a> {
    /// Nothing: the records are ours.
    Ours,
    /// The score is not above this: nobody renewed it.
    Overdue(f64),
    /// This session still counts as dead with this score.
    Dead(&'a str, &'a str),
}

/// Puts messages back, pushing them in the order given; those that are gone are passed over. Marked as
/// redelivered, as kombu does. Answers how many are back.
pub(crate) async fn put_back(
    link: &Link,
    shared: &Shared,
    fields: &[String],
    end: End,
    guard: Guard<'_>,
) -> Result<usize, BrokerError> {
    let mut count = 0;
    let (mut batch, mut rest) = (Batch::new(BATCH), fields);
    while !rest.is_empty() {
        let (fields, after) = rest.split_at(batch.size().min(rest.len()));
        rest = after;
        let mut read = redis::cmd("HMGET");
        read.arg(&shared.keys.unacked).arg(fields);
        let records: Vec<Option<Vec<u8>>> = link.query(&read).await?;
        batch.saw(fields.len(), records.iter().flatten().map(Vec::len).sum());
        let mut routes = Routes::new(link, shared);
        let mut call = shared.call();
        call.arg(if end == End::Head { "RPUSH" } else { "LPUSH" });
        match guard {
            Guard::Ours => call.arg("").arg("").arg(""),
            Guard::Overdue(ceiling) => call.arg(ceiling).arg("").arg(""),
            Guard::Dead(owner, score) => call.arg("").arg(owner).arg(score),
        };
        for (field, record) in fields.iter().zip(&records) {
            let lists = match record.as_deref().map(envelope::restored) {
                Some(Ok(record)) => {
                    let lists = lists(&mut routes, shared, &record).await?;
                    call.arg(field).arg(record.envelope).arg(lists.len());
                    lists
                }
                Some(Err(error)) => {
                    let preview = preview(record.as_deref().unwrap_or_default());
                    tracing::error!(target: "celeriac.redis", field, %error, preview,
                        "A record of an unacknowledged message cannot be read; it is dropped.");
                    call.arg(field).arg("").arg(0);
                    Vec::new()
                }
                // Gone, or an index entry without a record: the script tidies up.
                None => {
                    call.arg(field).arg("").arg(0);
                    Vec::new()
                }
            };
            for list in lists {
                call.key(list);
            }
        }
        let done: Vec<i64> = link.eval(&RESTORE, &call).await?;
        count += done.iter().filter(|done| **done == 1).count();
    }
    Ok(count)
}

async fn lists(
    routes: &mut Routes<'_>,
    shared: &Shared,
    record: &Record,
) -> Result<Vec<String>, BrokerError> {
    let mut queues = if record.exchange.is_empty() {
        vec![record.routing_key.clone()]
    } else {
        routes.queues(&record.exchange, &record.routing_key).await?
    };
    if queues.is_empty() {
        // kombu would drop the message here, because nobody is bound any more. The routing key is nearly
        // always the queue's name.
        tracing::warn!(target: "celeriac.redis", exchange = record.exchange, routing_key = record.routing_key,
            "A restored message has no route any more; it goes to the queue named like its routing key.");
        queues.push(record.routing_key.clone());
    }
    Ok(queues.iter().map(|queue| shared.keys.list(queue, record.priority)).collect())
}

/// Marks a session dead: from then on it takes nothing, not even with commands that are still on their way.
/// `score`: what it must have. Answers its new score, or none when it was otherwise.
pub(crate) async fn mark_dead(
    link: &Link,
    shared: &Shared,
    owner: &str,
    score: Option<&str>,
) -> Result<Option<String>, BrokerError> {
    let mut call = Call::new([shared.keys.workers.as_str()]);
    call.arg(owner).arg(score.unwrap_or_default()).arg(0);
    link.eval(&BURY, &call).await
}

/// Gives back what a session marked dead still holds, oldest first in line, and removes it.
pub(crate) async fn bury(
    link: &Link,
    shared: &Shared,
    owner: &str,
    score: &str,
) -> Result<usize, BrokerError> {
    let mut fields = fields_of(link, shared, owner).await?;
    fields.sort_unstable_by_key(|(tag, _)| std::cmp::Reverse(*tag));
    let fields: Vec<String> = fields.into_iter().map(|(_, field)| field).collect();
    let count = put_back(link, shared, &fields, End::Head, Guard::Dead(owner, score)).await?;
    let mut call = Call::new([shared.keys.workers.as_str()]);
    call.arg(owner).arg(score).arg(1);
    link.eval::<Option<String>>(&BURY, &call).await?;
    Ok(count)
}

/// Takes a session off the register that holds nothing any more.
pub(crate) async fn resign(link: &Link, shared: &Shared, owner: &str) -> Result<(), BrokerError> {
    let mut call = Call::new([shared.keys.workers.as_str()]);
    call.arg(owner).arg("").arg(1);
    link.eval::<Option<String>>(&BURY, &call).await.map(drop)
}

/// What a session holds, parked messages not included: those belong to the worker.
async fn fields_of(link: &Link, shared: &Shared, owner: &str) -> Result<Vec<(u64, String)>, BrokerError> {
    let (prefix, mut cursor, mut fields) = (format!("{owner}:"), 0_u64, Vec::new());
    loop {
        let mut scan = redis::cmd("ZSCAN");
        scan.arg(&shared.keys.unacked_index).arg(cursor).arg("MATCH").arg(format!("{prefix}*"));
        scan.arg("COUNT").arg(2000);
        let (next, found): (u64, Vec<Value>) = link.query(&scan).await?;
        fields.extend(found.into_iter().step_by(2).filter_map(|member| {
            let field: String = redis::from_redis_value(member).ok()?;
            let tag = field.strip_prefix(&prefix)?.parse().ok()?;
            Some((tag, field))
        }));
        cursor = next;
        if cursor == 0 {
            fields.sort_unstable();
            fields.dedup();
            return Ok(fields);
        }
    }
}

/// The beginning of something unreadable, for the log.
pub(crate) fn preview(bytes: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
    if bytes.len() > 200 { format!("{shown}… ({} bytes)", bytes.len()) } else { shown }
}
