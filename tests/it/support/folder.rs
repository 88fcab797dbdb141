//! A temporary folder, removed on drop.

use std::path::{Path, PathBuf};

/// A fresh folder.
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// Makes one.
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(super::unique("celeriac-it"));
        std::fs::create_dir_all(&path).expect("a temporary folder can be made");
        Self(path)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Best effort: a folder left in the temporary directory breaks nothing.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
