//! The suite on `file://`, and what only it promises.

use std::fs;
use std::sync::Arc;

use celeriac::backend::ResultBackend;
use celeriac::backend::file::FileBackend;

use super::{Harness, record};
use crate::support::folder::Folder;

pub(crate) struct FileHarness(Folder);

fn open(url: String) -> Result<Arc<dyn ResultBackend>, celeriac::error::BackendError> {
    Ok(Arc::new(FileBackend::open(&url)?))
}

impl Harness for FileHarness {
    async fn start() -> Option<Self> {
        Some(Self(Folder::new()))
    }

    fn backend(&self) -> Arc<dyn ResultBackend> {
        open(format!("file://{}", self.0.path().display())).unwrap()
    }

    fn expires(&self) -> bool {
        false
    }

    fn kill(&mut self) -> bool {
        fs::remove_dir_all(self.0.path()).unwrap();
        true
    }
}

#[tokio::test]
async fn a_result_is_one_file_named_by_its_key_and_nothing_else_is_left() {
    let harness = FileHarness::start().await.unwrap();
    let success = record("one", "SUCCESS", "10");
    harness.backend().store(&[record("one", "STARTED", ""), success.clone()]).await;
    let files: Vec<_> =
        fs::read_dir(harness.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["celery-task-meta-one"]);
    assert_eq!(fs::read(harness.0.path().join("celery-task-meta-one")).unwrap(), success.document);
}

#[test]
fn an_address_without_a_folder_is_refused_with_its_name() {
    let Err(error) = open("file://".to_owned()) else { panic!("it was taken") };
    assert!(error.to_string().contains("file://"), "{error}");
    assert!(open("file://localhost/tmp".to_owned()).is_ok());
}
