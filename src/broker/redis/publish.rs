//! Messages go out: into the lists of their queues, or by pub/sub.

use tokio::sync::oneshot;

use super::link::Link;
use super::routes::{self, Routes};
use super::shared::Shared;
use crate::broker::Publication;
use crate::broker::envelope;
use crate::error::BrokerError;

/// Who waits for a publication.
pub(crate) type Answer = oneshot::Sender<Result<(), BrokerError>>;

/// Replies to remote control that nobody fetched are deleted after so many seconds: a client that is there
/// takes them as they come.
const REPLY_EXPIRES: i64 = 60;

/// Publishes in this order, in one round trip beside the look-ups. Answers who is to be told of success; the others
/// have been told why not. An error of the connection is told and returned.
pub(crate) async fn publish(
    link: &Link,
    shared: &Shared,
    publications: Vec<(Box<Publication>, Answer)>,
) -> Result<Vec<Answer>, BrokerError> {
    let mut routes = Routes::new(link, shared);
    let mut pipeline = redis::pipe();
    let mut waiting = Vec::new();
    for (publication, answer) in publications {
        match push(link, &mut pipeline, &mut routes, shared, &publication).await {
            Ok(()) => waiting.push(answer),
            Err(error) => {
                let _ = answer.send(Err(error));
            }
        }
    }
    // Nothing to send: no queue is bound, and the message is dropped as kombu does.
    if pipeline.is_empty() {
        return Ok(waiting);
    }
    match link.pipe::<()>(&pipeline).await {
        Ok(()) => Ok(waiting),
        Err(error) => {
            for answer in waiting {
                let _ = answer.send(Err(link.gone(&format!("publishing failed: {error}"))));
            }
            Err(error)
        }
    }
}

async fn push(
    link: &Link,
    pipeline: &mut redis::Pipeline,
    routes: &mut Routes<'_>,
    shared: &Shared,
    publication: &Publication,
) -> Result<(), BrokerError> {
    let (envelope, priority) =
        envelope::write(publication, shared.options.base64).map_err(|error| BrokerError::Refused {
            address: shared.address.to_string(),
            reason: format!("a message for {:?} cannot be written: {error}", publication.routing_key),
        })?;
    if let Some(queue) = &publication.declare
        && !shared.declared().contains(&queue.name)
    {
        routes::declare(link, shared, queue).await?;
        shared.declared().insert(queue.name.clone());
    }
    let (exchange, key) = (publication.exchange.as_str(), publication.routing_key.as_str());
    if publication.exchange_type.as_deref() == Some("fanout") {
        pipeline.publish(shared.keys.channel(exchange, key), envelope).ignore();
        return Ok(());
    }
    let queues =
        if exchange.is_empty() { vec![key.to_owned()] } else { routes.queues(exchange, key).await? };
    for queue in queues {
        let list = shared.keys.list(&queue, priority);
        pipeline.lpush(&list, &envelope).ignore();
        if exchange.ends_with(".pidbox") {
            pipeline.expire(&list, REPLY_EXPIRES).ignore();
        }
    }
    Ok(())
}
