//! Where a worker keeps what it holds: `<data folder>/.celeriac/<worker>/`, beside a file `<worker>.lock` that it
//! keeps locked while it lives.
//!
//! The folder lies inside the data folder, so that taking a message and giving it back are one rename each: at any
//! instant a message is in the queue or on exactly one desk. kombu sees nothing of it, for the name is no message's.
//! The kernel lets go of the lock of a worker that dies, and tells the others that the file was closed; whoever gets
//! the lock puts the messages back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use uuid::Uuid;

use crate::broker::envelope;
use crate::protocol::{DeliveryInfo, Message};

/// The folder of desks in a data folder.
pub(super) const FOLDER: &str = ".celeriac";
/// Where files are put that are no messages.
const MALFORMED: &str = "malformed";

/// A worker's desk, locked as long as this lives.
#[derive(Debug)]
pub(super) struct Desk {
    incoming: PathBuf,
    desks: PathBuf,
    folder: PathBuf,
    lock: PathBuf,
    _locked: File,
}

/// What became of an attempt to take a message.
#[derive(Debug)]
pub(super) enum Taken {
    /// It is on the desk.
    Message(Box<(Message, DeliveryInfo)>),
    /// Somebody was faster.
    Gone,
    /// It is being written; its writer will close it, and that is an event.
    Busy,
    /// It makes no sense, or none yet; the reason.
    Unreadable(String),
}

impl Desk {
    /// The folder of desks of a data folder.
    pub(super) fn folder_in(incoming: &Path) -> PathBuf {
        incoming.join(FOLDER)
    }

    /// Sets up a desk.
    pub(super) fn open(incoming: &Path) -> io::Result<Self> {
        let desks = Self::folder_in(incoming);
        fs::create_dir_all(&desks)?;
        let id = Uuid::new_v4().simple().to_string();
        // Locked before it has the name by which others find it, so that nobody takes us for dead.
        let (unnamed, lock) = (desks.join(format!("{id}.new")), desks.join(format!("{id}.lock")));
        let locked = File::create(&unnamed)?;
        flock(&locked, FlockOperation::LockExclusive)?;
        fs::rename(&unnamed, &lock)?;
        let folder = desks.join(&id);
        fs::create_dir(&folder)?;
        Ok(Self { incoming: incoming.to_owned(), desks, folder, lock, _locked: locked })
    }

    /// Whether it is still there: somebody may have removed the data folder.
    pub(super) fn exists(&self) -> bool {
        self.lock.exists() && self.folder.exists()
    }

    /// Takes a message from its queue.
    pub(super) fn take(&self, name: &str, queue: &str) -> io::Result<Taken> {
        let source = self.incoming.join(name);
        let (inode, message) = match read(&source, queue)? {
            Ok(read) => read,
            Err(taken) => return Ok(taken),
        };
        let target = self.folder.join(name);
        match fs::rename(&source, &target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Taken::Gone),
            Err(error) => return Err(error),
        }
        if fs::metadata(&target)?.ino() == inode {
            return Ok(Taken::Message(message));
        }
        // Taken and given back by another worker between the two calls: what we have now is not what was read.
        self.again(name, queue)
    }

    /// Reads a message that is on the desk.
    pub(super) fn again(&self, name: &str, queue: &str) -> io::Result<Taken> {
        Ok(match read(&self.folder.join(name), queue)? {
            Ok((_, message)) => Taken::Message(message),
            Err(taken) => taken,
        })
    }

    /// Takes a message off the desk for good, into `processed` if it is to be kept.
    pub(super) fn finish(&self, name: &str, processed: Option<&Path>) -> io::Result<()> {
        done_with(&self.folder.join(name), processed)
    }

    /// Puts a message back into the data folder under `new_name`, marked as redelivered.
    pub(super) fn give_back(&self, name: &str, new_name: &str) -> io::Result<()> {
        give_back(&self.folder, name, &self.incoming.join(new_name))
    }

    /// Puts a file that is no message where it is in nobody's way.
    pub(super) fn put_aside(&self, name: &str) -> io::Result<()> {
        let aside = self.desks.join(MALFORMED);
        fs::create_dir_all(&aside)?;
        fs::rename(self.incoming.join(name), aside.join(name))
    }

    /// Puts back what dead workers held. `true`: there are desks whose owner seems to live.
    pub(super) fn recover(&self) -> io::Result<bool> {
        let mut others = false;
        for entry in fs::read_dir(&self.desks)? {
            let lock = entry?.path();
            if lock.extension().is_none_or(|extension| extension != "lock") || lock == self.lock {
                continue;
            }
            // Opened for reading: closing a file that was open for writing would wake everybody again.
            let Ok(file) = File::open(&lock) else { continue };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => clear(&lock, &self.incoming)?,
                Err(Errno::WOULDBLOCK) => others = true,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(others)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // A desk that is not empty keeps its lock file, by which another worker finds it.
        if fs::remove_dir(&self.folder).is_ok() {
            // Somebody may have been faster.
            let _ = fs::remove_file(&self.lock);
        }
    }
}

/// Empties the desk of a dead worker, whose lock is held by the caller.
fn clear(lock: &Path, incoming: &Path) -> io::Result<()> {
    let folder = lock.with_extension("");
    let mut count = 0;
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return forget(lock),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with('.') {
            // The unfinished copy of a message that is here as well.
            fs::remove_file(folder.join(name))?;
            continue;
        }
        give_back(&folder, name, &incoming.join(name))?;
        count += 1;
    }
    fs::remove_dir(&folder)?;
    forget(lock)?;
    if count > 0 {
        tracing::warn!(target: "celery.worker.consumer", "Restored {count} message(s) of a worker that has died.");
    }
    Ok(())
}

fn forget(lock: &Path) -> io::Result<()> {
    match fs::remove_file(lock) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A message that is over: removed, or moved to where processed ones are kept.
pub(super) fn done_with(path: &Path, processed: Option<&Path>) -> io::Result<()> {
    let (Some(processed), Some(name)) = (processed, path.file_name()) else { return fs::remove_file(path) };
    let target = processed.join(name);
    match fs::rename(path, &target) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            fs::copy(path, &target)?;
            fs::remove_file(path)
        }
        result => result,
    }
}

fn give_back(folder: &Path, name: &str, target: &Path) -> io::Result<()> {
    let held = folder.join(name);
    // What cannot be marked was read once and is whole: it goes back as it is.
    if let Ok(text) = envelope::marked(&fs::read(&held)?) {
        let copy = folder.join(format!(".{name}"));
        fs::write(&copy, text)?;
        fs::rename(&copy, &held)?;
    }
    fs::rename(&held, target)
}

type Found = (u64, Box<(Message, DeliveryInfo)>);

/// Reads a message file: its inode and what it says.
fn read(path: &Path, queue: &str) -> io::Result<Result<Found, Taken>> {
    // Neither a link nor a pipe may lead us elsewhere or keep us waiting.
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let mut file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(Taken::Gone)),
        Err(error) if out_of_descriptors(&error) => return Err(error),
        Err(error) => return Ok(Err(Taken::Unreadable(error.to_string()))),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Err(Taken::Unreadable("not a regular file".to_owned())));
    }
    // kombu writes under an exclusive lock; ours does not disturb other readers.
    if let Err(error) = flock(&file, FlockOperation::NonBlockingLockShared) {
        return if error == Errno::WOULDBLOCK { Ok(Err(Taken::Busy)) } else { Err(error.into()) };
    }
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    Ok(match envelope::read(&text, queue) {
        Ok(message) => Ok((metadata.ino(), Box::new(message))),
        Err(malformed) => Err(Taken::Unreadable(malformed.to_string())),
    })
}

fn out_of_descriptors(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
