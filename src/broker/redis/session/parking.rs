//! Parked deliveries: held by the broker under a field of the worker's, with the score at which anybody may
//! restore them.

use redis::Value;

use super::Live;
use crate::broker::envelope;
use crate::broker::redis::batch::Batch;
use crate::broker::redis::link::MOVE;
use crate::broker::{Event, Tag};
use crate::error::BrokerError;

/// Records moved by one script.
const BATCH: usize = 64;

impl Live {
    pub(super) async fn park(&mut self) -> Result<(), BrokerError> {
        let timeout = self.shared.options.visibility_timeout;
        let parks = std::mem::take(&mut self.parks);
        let moves = parks.iter().map(|(tag, due)| {
            (
                self.shared.field(self.session, *tag),
                self.shared.parked_field(*tag),
                (due - timeout).to_string(),
            )
        });
        let moved = self.rename(moves.collect(), false).await?;
        let gone: Vec<Tag> =
            parks.iter().zip(moved).filter(|(_, moved)| moved.is_none()).map(|((tag, _), _)| *tag).collect();
        if !gone.is_empty() {
            self.shared.parked().retain(|tag| !gone.contains(tag));
            self.emit(Event::Forgotten(gone));
        }
        Ok(())
    }

    pub(super) async fn unpark(&mut self) -> Result<(), BrokerError> {
        let tags = std::mem::take(&mut self.unparks);
        let moves = tags.iter().map(|tag| {
            (self.shared.parked_field(*tag), self.shared.field(self.session, *tag), String::new())
        });
        let records = self.rename(moves.collect(), true).await?;
        let (mut deliveries, mut gone) = (Vec::new(), Vec::new());
        {
            let mut unparking = self.shared.unparking();
            for tag in &tags {
                unparking.remove(tag);
            }
        }
        for (tag, record) in tags.into_iter().zip(records) {
            match record {
                Some(record) => self.deliver(tag, envelope::taken(&record), &record, &mut deliveries),
                None => gone.push(tag),
            }
        }
        if !gone.is_empty() {
            self.emit(Event::Forgotten(gone));
        }
        if !deliveries.is_empty() {
            self.emit(Event::Deliveries(deliveries));
        }
        Ok(())
    }

    pub(super) async fn rename(
        &self,
        moves: Vec<(String, String, String)>,
        with_records: bool,
    ) -> Result<Vec<Option<Vec<u8>>>, BrokerError> {
        let mut answers = Vec::with_capacity(moves.len());
        let (mut batch, mut rest) = (Batch::new(BATCH), &moves[..]);
        while !rest.is_empty() {
            let (moves, after) = rest.split_at(batch.size().min(rest.len()));
            rest = after;
            let mut call = self.shared.call();
            call.arg(&self.owner).arg(i64::from(with_records));
            for (old, new, score) in moves {
                call.arg(old).arg(new).arg(score);
            }
            let answer: Option<Vec<Value>> = self.link.eval(&MOVE, &call).await?;
            let answer = answer.ok_or_else(|| self.declared_dead())?;
            let bytes =
                answer.iter().map(|value| if let Value::BulkString(it) = value { it.len() } else { 0 }).sum();
            batch.saw(moves.len(), bytes);
            answers.extend(answer.into_iter().map(|value| match value {
                Value::Nil => None,
                Value::BulkString(record) => Some(record),
                _ => Some(Vec::new()),
            }));
        }
        Ok(answers)
    }
}
