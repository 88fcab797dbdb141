//! The slots of a pool of one child with many: more and fewer of them, and ending one job of many.

use std::sync::Arc;

use super::Slots;
use crate::pool::JobId;
use crate::pool::process::Link;
use crate::pool::slots::Phase;

impl Slots {
    /// Adds slots to the one child, those first that were closed.
    pub(in crate::pool) fn widen(&mut self, by: u32) {
        let mut closed: Vec<u32> = self.closed.iter().copied().collect();
        closed.sort_unstable();
        closed.truncate(by as usize);
        let first = self.lanes;
        self.lanes += by - u32::try_from(closed.len()).unwrap_or(by);
        let added: Vec<u32> = closed.into_iter().chain(first..self.lanes).collect();
        for slot in added {
            self.closed.remove(&slot);
            let Some(child) = self.children.get_mut(&0) else { continue };
            if slot >= first {
                child.lanes.push(None);
            }
            let vacant = child.lanes.get(slot as usize).is_some_and(Option::is_none);
            if child.phase == Phase::Up && vacant {
                self.free(slot);
            }
        }
    }

    /// Closes slots of the one child, idle ones first; the job of another goes on to its end.
    pub(in crate::pool) fn narrow(&mut self, by: u32) {
        let busy = self.children.get(&0).map(|child| child.lanes.iter().map(Option::is_some).collect());
        let busy: Vec<bool> = busy.unwrap_or_default();
        let mut open: Vec<u32> = (0..self.lanes).filter(|slot| !self.closed.contains(slot)).collect();
        open.sort_by_key(|slot| {
            (busy.get(*slot as usize).copied().unwrap_or(false), std::cmp::Reverse(*slot))
        });
        open.truncate(by as usize);
        self.idle.retain(|slot| !open.contains(slot));
        self.closed.extend(open);
    }

    /// The way to the child that runs a job, to say something about it.
    pub(in crate::pool) fn owner(&mut self, job: JobId) -> Option<Arc<Link>> {
        let slot = *self.jobs.get(&job)?;
        let child = self.children.get_mut(&(slot / self.lanes))?;
        child.last = None;
        child.link.clone()
    }
}
