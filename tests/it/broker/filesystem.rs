//! The suite on `filesystem://`, and what only it promises.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use celeriac::broker::filesystem::FilesystemBroker;
use celeriac::broker::{Broker, BrokerConfig, Settlement};
use celeriac::protocol::Message;
use serde_json::json;

use super::client::Client;
use super::{GARBAGE, Harness, envelope, id, message};
use crate::support::folder::Folder;
use crate::support::{unique, wait_until};

/// A namespace is a folder.
pub(crate) struct FilesystemHarness {
    folder: Folder,
    published: AtomicU64,
}

impl FilesystemHarness {
    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn config(&self) -> BrokerConfig {
        serde_json::from_value(json!({
            "urls": ["filesystem://"], "retry": true, "retry_on_startup": true,
            "transport_options": {
                "data_folder_in": self.data(), "data_folder_out": self.data(),
                "control_folder": self.folder.path().join("control"),
            },
        }))
        .unwrap()
    }

    /// A path that a new message of a queue has.
    fn path(&self, queue: &str) -> PathBuf {
        let number = self.published.fetch_add(1, Ordering::Relaxed);
        self.data().join(format!("{}_{}.{queue}.msg", 1000 + number, unique("")))
    }

    fn files(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let mut folders = vec![self.data()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Ok(path) = path.strip_prefix(self.data()) {
                    files.push(path.to_str().unwrap().to_owned());
                }
            }
        }
        files.retain(|file| wanted(file));
        files
    }
}

impl Harness for FilesystemHarness {
    async fn start() -> Option<Self> {
        let harness = Self { folder: Folder::new(), published: AtomicU64::new(0) };
        fs::create_dir_all(harness.data()).unwrap();
        Some(harness)
    }

    fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(FilesystemBroker::open("filesystem://", &self.config()).unwrap())
    }

    fn name(&self, base: &str) -> String {
        base.to_owned()
    }

    async fn publish(&self, queue: &str, message: &Message) {
        fs::write(self.path(queue), envelope(queue, message).to_string()).unwrap();
    }

    async fn publish_garbage(&self, queue: &str) {
        for garbage in GARBAGE {
            fs::write(self.path(queue), garbage).unwrap();
        }
        fs::create_dir(self.path(queue)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", self.path(queue)).unwrap();
    }

    async fn waiting(&self, queue: &str) -> usize {
        let end = format!(".{queue}.msg");
        let entries = fs::read_dir(self.data()).unwrap().flatten();
        entries.filter(|entry| entry.file_name().to_str().unwrap().ends_with(&end)).count()
    }

    async fn unsettled(&self) -> Option<usize> {
        Some(
            self.files(|file| {
                file.starts_with(".celeriac/") && !file.contains("malformed") && file.ends_with(".msg")
            })
            .len(),
        )
    }
}

#[tokio::test]
async fn a_message_that_is_still_being_written_waits_for_its_writer() {
    let harness = FilesystemHarness::start().await.unwrap();
    let queue = harness.queue("q");
    let mut client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 4)).await;
    let text = envelope(&queue.name, &message("slow")).to_string();
    let (first, rest) = text.split_at(text.len() / 2);
    let path = harness.path(&queue.name);
    let mut file = fs::File::create(&path).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    file.write_all(first.as_bytes()).unwrap();
    harness.publish(&queue.name, &message("quick")).await;
    let quick = client.next().await;
    assert_eq!(id(&quick.message), "quick");
    file.write_all(rest.as_bytes()).unwrap();
    drop(file);
    let slow = client.next().await;
    assert_eq!(id(&slow.message), "slow");
    client.settle([quick, slow], Settlement::Ack).await;
    client.close().await;
    assert_eq!(harness.waiting(&queue.name).await, 0);
}

#[tokio::test]
async fn files_that_are_no_messages_are_put_aside() {
    let harness = FilesystemHarness::start().await.unwrap();
    let queue = harness.queue("q");
    let client = Client::connect(&*harness.broker(), &harness.consume(&[&queue], 4)).await;
    fs::write(harness.path(&queue.name), "no message").unwrap();
    let aside = || harness.files(|file| file.starts_with(".celeriac/malformed/")).len();
    wait_until("the file is put aside", async || aside() == 1).await;
    assert_eq!(harness.waiting(&queue.name).await, 0);
    client.close().await;
}

#[tokio::test]
async fn processed_messages_are_kept_where_that_is_asked_for() {
    let harness = FilesystemHarness::start().await.unwrap();
    let queue = harness.queue("q");
    let mut config = harness.config();
    let processed = harness.folder.path().join("processed");
    config.transport_options.insert("store_processed".to_owned(), json!(true));
    config.transport_options.insert("processed_folder".to_owned(), json!(processed));
    let broker = FilesystemBroker::open("filesystem://", &config).unwrap();
    let mut client = Client::connect(&broker, &harness.consume(&[&queue], 4)).await;
    harness.publish(&queue.name, &message("kept")).await;
    let delivery = client.next().await;
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert_eq!(fs::read_dir(&processed).unwrap().count(), 1);
}

#[tokio::test]
async fn a_closed_worker_leaves_nothing_behind() {
    let harness = FilesystemHarness::start().await.unwrap();
    let queue = harness.queue("q");
    let broker = harness.broker();
    let mut consume = harness.consume(&[&queue], 4);
    consume.control = Some(harness.control());
    let mut client = Client::connect(&*broker, &consume).await;
    harness.publish(&queue.name, &message("one")).await;
    let delivery = client.next().await;
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    drop(broker);
    assert_eq!(harness.files(|_| true), Vec::<String>::new());
    let table = fs::read_to_string(harness.folder.path().join("control/ctl.pidbox.exchange")).unwrap();
    assert_eq!(table, "[]");
}

#[tokio::test]
async fn a_removed_folder_is_a_lost_connection_and_is_made_again() {
    let harness = FilesystemHarness::start().await.unwrap();
    let queue = harness.queue("q");
    let broker = harness.broker();
    let client = Client::connect(&*broker, &harness.consume(&[&queue], 4)).await;
    fs::remove_dir_all(harness.data()).unwrap();
    let error = client.lost().await;
    assert!(error.is_retryable(), "{error}");
    let mut client = Client::connect(&*broker, &harness.consume(&[&queue], 4)).await;
    harness.publish(&queue.name, &message("after")).await;
    let delivery = client.next().await;
    client.settle([delivery], Settlement::Ack).await;
    client.close().await;
    assert_eq!(harness.files(|file| file.ends_with(".msg")), Vec::<String>::new());
}
