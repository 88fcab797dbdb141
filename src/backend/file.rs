//! `file:///path`: one file a result, named by its key, as Celery's filesystem backend has it. Files do not expire by
//! themselves: `celery.backend_cleanup` removes old ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Record, ResultBackend, document};
use crate::error::{BackendError, mask};

/// The results in a folder.
#[derive(Debug)]
pub struct FileBackend {
    address: String,
    folder: PathBuf,
    written: AtomicU64,
}

impl FileBackend {
    /// The backend of an address.
    ///
    /// # Errors
    /// When the address names no folder.
    pub fn open(url: &str) -> Result<Self, BackendError> {
        let address = mask(url);
        let path = url.strip_prefix("file://localhost/").map(|rest| format!("/{rest}"));
        let path = path.or_else(|| url.strip_prefix("file://").map(str::to_owned)).unwrap_or_default();
        if path.is_empty() {
            let reason = "it names no folder, as file:///path/of/folder does".to_owned();
            return Err(BackendError::Address { address, reason });
        }
        // A worker that changes its folder later keeps its results together.
        let folder = std::path::absolute(path)
            .map_err(|error| BackendError::Address { address: address.clone(), reason: error.to_string() })?;
        Ok(Self { address, folder, written: AtomicU64::new(0) })
    }

    fn path(&self, key: &str) -> io::Result<PathBuf> {
        // A task id comes from the wire.
        if key.is_empty() || key.starts_with('.') || key.contains(['/', '\0']) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("no file can be called {key:?}"),
            ));
        }
        Ok(self.folder.join(key))
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.path(&record.key())?;
        if read(&path)?.is_some_and(|stored| document::is_success(&stored)) {
            return Ok(());
        }
        // Whoever reads it finds the old document or the new one, never half of one.
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let unfinished = self.folder.join(format!(".celeriac-{}-{number}", std::process::id()));
        let written = fs::write(&unfinished, &record.document).and_then(|()| fs::rename(&unfinished, &path));
        if written.is_err() {
            // The error that matters is the first.
            let _ = fs::remove_file(&unfinished);
        }
        written
    }

    fn error(&self, what: String, error: &io::Error) -> BackendError {
        use io::ErrorKind::{
            InvalidFilename, InvalidInput, IsADirectory, PermissionDenied, ReadOnlyFilesystem,
        };
        let (address, reason) = (self.address.clone(), error.to_string());
        match error.kind() {
            InvalidInput | InvalidFilename | IsADirectory | PermissionDenied | ReadOnlyFilesystem => {
                BackendError::Refused { address, what, reason }
            }
            _ => BackendError::Connection { address, reason },
        }
    }
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(document) => Ok(Some(document)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[async_trait]
impl ResultBackend for FileBackend {
    fn address(&self) -> String {
        self.address.clone()
    }

    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        let store = |record: &Record| {
            let what = || format!("the result of {}", record.task_id);
            self.write(record).map_err(|error| self.error(what(), &error))
        };
        records.iter().map(store).collect()
    }

    async fn get(&self, task_id: &str) -> Result<Option<Bytes>, BackendError> {
        let document = self.path(&super::key_of(task_id)).and_then(|path| read(&path));
        let document =
            document.map_err(|error| self.error(format!("to read the result of {task_id}"), &error))?;
        Ok(document.map(Bytes::from))
    }
}
