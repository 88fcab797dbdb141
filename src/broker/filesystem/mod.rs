//! `filesystem://`: queues as folders of files, in kombu's layout, shared with Python producers and workers. No server
//! is needed: this is the embedded default.
//!
//! Messages are files of `data_folder_in`, named as [`names`] says and written as [`envelope`] says; what is published
//! goes to `data_folder_out` (mostly the same folder). Remote control and topic exchanges go through the tables of
//! [`exchange`]. Beyond kombu: the kernel wakes us (inotify), nothing is polled; what a worker holds lies on its
//! [`desk`] and comes back when it dies; a file appears whole or not at all. All workers must run on one machine.

mod desk;
mod exchange;
mod names;
mod session;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde_json::{Map, Value};

use self::desk::Desk;
use self::exchange::Tables;
use self::names::Namer;
use super::{Broker, BrokerConfig, Capabilities, Consume, Session, Settlement, Tag};
use crate::error::BrokerError;

/// A worker's access to the queues of some folders.
#[derive(Clone)]
pub struct FilesystemBroker {
    worker: Arc<Worker>,
}

/// What outlives a session.
struct Worker {
    address: String,
    folders: Folders,
    next_tag: AtomicU64,
    holding: Mutex<Holding>,
}

/// What this worker holds; the files are on the desk.
#[derive(Default)]
struct Holding {
    desk: Option<Arc<Desk>>,
    held: HashMap<Tag, Held>,
    parked: HashMap<Tag, Held>,
    namer: Namer,
}

#[derive(Clone)]
struct Held {
    name: String,
    queue: String,
}

/// The folders, as `broker_transport_options` names them.
#[derive(Clone, Debug)]
struct Folders {
    incoming: PathBuf,
    outgoing: PathBuf,
    /// Where settled messages are kept; none: they are removed.
    processed: Option<PathBuf>,
    tables: Tables,
}

impl FilesystemBroker {
    /// The broker of an address; all that matters is in the transport options.
    ///
    /// # Errors
    /// When an option is no path.
    pub fn open(url: &str, config: &BrokerConfig) -> Result<Self, BrokerError> {
        let rest = url.split_once("://").map_or("", |(_, rest)| rest);
        let (host, path) = rest.split_once('/').unwrap_or((rest, "/"));
        let host = if host.is_empty() { "localhost" } else { host };
        // As kombu shows it.
        let address = format!("filesystem://:**@{host}/{path}");
        let folders = Folders::of(&config.transport_options)
            .map_err(|reason| BrokerError::Address { address: address.clone(), reason })?;
        let worker = Worker { address, folders, next_tag: AtomicU64::new(1), holding: Mutex::default() };
        Ok(Self { worker: Arc::new(worker) })
    }
}

impl Folders {
    fn of(options: &Map<String, Value>) -> Result<Self, String> {
        let path = |name: &str, default: &str| -> Result<PathBuf, String> {
            let path = match options.get(name) {
                None | Some(Value::Null) => default,
                Some(Value::String(path)) => path,
                Some(other) => return Err(format!("broker_transport_options {name} is {other}, not a path")),
            };
            // A worker that changes its folder later keeps its queues.
            std::path::absolute(path).map_err(|error| format!("broker_transport_options {name}: {error}"))
        };
        let keeps = options
            .get("store_processed")
            .is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)));
        Ok(Self {
            incoming: path("data_folder_in", "data_in")?,
            outgoing: path("data_folder_out", "data_out")?,
            processed: keeps.then(|| path("processed_folder", "processed")).transpose()?,
            tables: Tables(path("control_folder", "control")?),
        })
    }

    /// Makes the folders that are missing.
    fn create(&self) -> io::Result<()> {
        let folders =
            [Some(&self.incoming), Some(&self.outgoing), self.processed.as_ref(), Some(&self.tables.0)];
        for folder in folders.into_iter().flatten() {
            fs::create_dir_all(folder)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", folder.display())))?;
        }
        Ok(())
    }
}

#[async_trait]
impl Broker for FilesystemBroker {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            settles_across_sessions: true,
            parks: true,
            fanout: true,
            remembers: false,
            listens: false,
        }
    }

    fn address(&self) -> String {
        self.worker.address.clone()
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        session::open(Arc::clone(&self.worker), consume).map_err(|error| self.worker.error(&error))
    }
}

impl Worker {
    fn lock(&self) -> MutexGuard<'_, Holding> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, error: &io::Error) -> BrokerError {
        use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem};
        let (address, reason) = (self.address.clone(), error.to_string());
        match error.kind() {
            InvalidInput | PermissionDenied | ReadOnlyFilesystem => BrokerError::Refused { address, reason },
            _ => BrokerError::Connection { address, reason },
        }
    }

    /// The desk, set up when it is first needed and when the folder was removed. With it what was lost with an
    /// earlier one.
    fn desk(&self) -> io::Result<(Arc<Desk>, Vec<Tag>)> {
        let mut holding = self.lock();
        if let Some(desk) = holding.desk.as_ref().filter(|desk| desk.exists()) {
            return Ok((Arc::clone(desk), Vec::new()));
        }
        let desk = Arc::new(Desk::open(&self.folders.incoming)?);
        let lost = holding.held.drain().map(|(tag, _)| tag).collect::<Vec<_>>();
        let lost = lost.into_iter().chain(holding.parked.drain().map(|(tag, _)| tag)).collect();
        holding.desk = Some(Arc::clone(&desk));
        Ok((desk, lost))
    }

    /// Remembers that a message is on the desk.
    fn hold(&self, held: Held) -> Tag {
        let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
        self.lock().held.insert(tag, held);
        tag
    }

    /// Deliveries that count as prefetched.
    fn active(&self) -> usize {
        self.lock().held.len()
    }

    fn settle(&self, desk: &Desk, tag: Tag, settlement: Settlement) {
        let mut holding = self.lock();
        let removed = holding.held.remove(&tag);
        let Some(held) = removed.or_else(|| holding.parked.remove(&tag)) else { return };
        let result = match settlement {
            Settlement::Ack | Settlement::Reject => {
                desk.finish(&held.name, self.folders.processed.as_deref())
            }
            Settlement::Requeue => match holding.namer.name(&held.queue) {
                Some(name) => desk.give_back(&held.name, &name),
                None => desk.give_back(&held.name, &held.name),
            },
            Settlement::GiveBack => desk.give_back(&held.name, &held.name),
        };
        if let Err(error) = result {
            tracing::error!(
                target: "celery.worker.consumer",
                "Couldn't settle {} ({settlement:?}): {error}",
                held.name
            );
        }
    }

    /// Gives back all that `which` chooses.
    fn give_back(&self, desk: &Desk, which: impl Fn(Tag) -> bool) {
        let tags: Vec<Tag> = {
            let holding = self.lock();
            holding.held.keys().chain(holding.parked.keys()).copied().filter(|tag| which(*tag)).collect()
        };
        for tag in tags {
            self.settle(desk, tag, Settlement::GiveBack);
        }
    }

    /// Writes a message file. It appears whole: a reader finds no half of it.
    fn put(&self, queue: &str, text: &[u8]) -> io::Result<()> {
        let Some(name) = self.lock().namer.name(queue) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("no file can be named for queue {queue:?}"),
            ));
        };
        let folder: &Path = &self.folders.outgoing;
        let unfinished = folder.join(format!(".{name}.new"));
        let written = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, folder.join(name)));
        if written.is_err() {
            // What is left of it is no message; the error that matters is the first.
            let _ = fs::remove_file(&unfinished);
        }
        written
    }
}
