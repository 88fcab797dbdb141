//! What a child notes without waking anybody: which job it has begun.
//!
//! A frame that says so would cost a task as much as the frame that says how it ended. So the child writes the job's
//! number into a file in memory that the supervisor shares, and the supervisor looks: when the job has ended, when
//! its child has died, and a moment after a job was given out that has not ended.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, fcntl_dupfd_cloexec, pread, retry_on_intr};

use super::JobId;

/// The supervisor's end.
#[derive(Debug)]
pub(super) struct Slate(OwnedFd);

impl Slate {
    /// An empty one, and the child's end of it.
    pub(super) fn new() -> Result<(Self, OwnedFd), Errno> {
        let file = memfd_create("celeriac-slate", MemfdFlags::CLOEXEC)?;
        let theirs = fcntl_dupfd_cloexec(&file, 3)?;
        Ok((Self(file), theirs))
    }

    /// The job that the child has begun last.
    pub(super) fn begun(&self) -> Option<JobId> {
        let mut number = [0; size_of::<JobId>()];
        let count = retry_on_intr(|| pread(&self.0, &mut number[..], 0)).ok()?;
        (count == number.len()).then(|| JobId::from_le_bytes(number))
    }
}

/// The child has begun this job.
///
/// # Errors
/// When the kernel has no page for it; nothing is noted then.
#[cfg(any(test, feature = "python"))]
pub(crate) fn note(slate: impl std::os::fd::AsFd, job: JobId) -> Result<(), Errno> {
    retry_on_intr(|| rustix::io::pwrite(&slate, &job.to_le_bytes(), 0)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_notes_last_is_seen() {
        let (slate, theirs) = Slate::new().unwrap();
        assert_eq!(slate.begun(), None);
        for job in [1, 2, JobId::MAX] {
            note(&theirs, job).unwrap();
            assert_eq!(slate.begun(), Some(job));
        }
        drop(theirs);
        assert_eq!(slate.begun(), Some(JobId::MAX));
    }
}
