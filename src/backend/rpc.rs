//! `rpc://`: results as messages to the reply queue of whoever sent the task, over the AMQP broker.
//!
//! The caller declares its queue; here a result is published to it by the default exchange, once, with the
//! task's id as correlation id. A caller that is gone has taken its queue along: the broker drops the result,
//! and that is no error. A task without a reply queue has no result.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::{BackendConfig, Record, ResultBackend};
use crate::broker::amqp::address::Address;
use crate::broker::amqp::publish::{Answer, PUBLISH_CAPACITY, Publisher};
use crate::broker::{BrokerConfig, Publication};
use crate::error::{BackendError, BrokerError};
use crate::protocol::{Json, Message};

type Publications = mpsc::Sender<(Box<Publication>, Answer)>;

/// The backend; connects when the first result is stored.
pub struct Rpc {
    /// The broker's failover list.
    addresses: Vec<Address>,
    /// 2 (`result_persistent`) or 1.
    delivery_mode: u8,
    /// The publisher, once there is one.
    publisher: Mutex<Option<(Publications, JoinSet<()>)>>,
}

impl Rpc {
    /// The backend over this broker. `None`: the broker is not AMQP.
    ///
    /// # Errors
    /// When the broker's address is wrong.
    pub fn new(config: &BackendConfig, broker: &BrokerConfig) -> Result<Option<Self>, BackendError> {
        let mut addresses = Vec::new();
        for url in &broker.urls {
            match Address::parse(url, broker) {
                Ok(Some(address)) => addresses.push(address),
                Ok(None) => return Ok(None),
                Err(BrokerError::Address { address, reason }) => {
                    return Err(BackendError::Address { address, reason });
                }
                Err(error) => {
                    return Err(BackendError::Address {
                        address: "rpc://".to_owned(),
                        reason: error.to_string(),
                    });
                }
            }
        }
        if addresses.is_empty() {
            return Ok(None);
        }
        let delivery_mode = if config.persistent { 2 } else { 1 };
        Ok(Some(Self { addresses, delivery_mode, publisher: Mutex::new(None) }))
    }

    /// Where publications go; starts the publisher.
    fn publications(&self) -> Publications {
        let mut publisher = self.publisher.lock().unwrap_or_else(PoisonError::into_inner);
        let (sender, _) = publisher.get_or_insert_with(|| {
            let (sender, receiver) = mpsc::channel(PUBLISH_CAPACITY);
            let mut tasks = JoinSet::new();
            tasks
                .spawn(Publisher::new(self.addresses.clone(), "celeriac results".to_owned(), receiver).run());
            (sender, tasks)
        });
        sender.clone()
    }

    fn publication(&self, record: &Record) -> Publication {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Publication {
            exchange: String::new(),
            exchange_type: None,
            routing_key: record.key.clone(),
            message: Message {
                content_type: text(&record.content_type),
                content_encoding: text(&record.content_encoding),
                headers: Json::empty(),
                properties: Json::of(&json!({
                    "correlation_id": record.task_id, "delivery_mode": self.delivery_mode, "priority": 0,
                })),
                body: record.document.clone(),
            },
            declare: None,
        }
    }

    fn error(&self, error: BrokerError, record: &Record) -> BackendError {
        match error {
            BrokerError::Connection { address, reason } => BackendError::Connection { address, reason },
            BrokerError::Refused { address, reason } => {
                BackendError::Refused { address, what: format!("the result of {}", record.task_id), reason }
            }
            BrokerError::Address { address, reason } => BackendError::Address { address, reason },
        }
    }
}

#[async_trait]
impl ResultBackend for Rpc {
    fn address(&self) -> String {
        "rpc://".to_owned()
    }

    async fn store(&self, records: &[Record]) -> Vec<Result<(), BackendError>> {
        let publications = self.publications();
        let mut waiting = Vec::with_capacity(records.len());
        for record in records {
            // A task without a reply queue: nobody asked for its result.
            if record.key.is_empty() {
                waiting.push(None);
                continue;
            }
            let (answer, answered) = oneshot::channel();
            // A publisher that has ended drops the answer, which is seen below.
            let _ = publications.send((Box::new(self.publication(record)), answer)).await;
            waiting.push(Some(answered));
        }
        let mut answers = Vec::with_capacity(records.len());
        for (record, answered) in records.iter().zip(waiting) {
            answers.push(match answered {
                None => Ok(()),
                Some(answered) => match answered.await {
                    Ok(answer) => answer.map_err(|error| self.error(error, record)),
                    Err(_) => Err(BackendError::Connection {
                        address: self.address(),
                        reason: "the publisher has ended".to_owned(),
                    }),
                },
            });
        }
        answers
    }

    async fn get(&self, task_id: &str) -> Result<Option<Bytes>, BackendError> {
        Err(BackendError::Refused {
            address: self.address(),
            what: format!("to look up {task_id}"),
            reason: "results of rpc:// are messages to the caller, they cannot be looked up".to_owned(),
        })
    }
}
