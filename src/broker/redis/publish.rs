//! Messages go out: into the lists of their queues, or by pub/sub.

use tokio::sync::oneshot;

use super::envelope;
use super::link::Link;
use super::routes::Routes;
use super::shared::Shared;
use crate::broker::Publication;
use crate::error::BrokerError;

/// Who waits for a publication.
pub(crate) type Answer = oneshot::Sender<Result<(), BrokerError>>;

/// Replies to remote control that nobody fetched are deleted after so many seconds: a client that is there
/// takes them as they come.
const REPLY_EXPIRES: i64 = 60;

/// Publishes in this order, in one round trip beside the look-ups. Everybody is answered; an error of the
/// connection is also returned.
pub(crate) async fn publish(
    link: &Link,
    shared: &Shared,
    publications: Vec<(Box<Publication>, Answer)>,
) -> Result<(), BrokerError> {
    let mut routes = Routes::new(link, shared);
    let mut pipeline = redis::pipe();
    let mut waiting = Vec::new();
    for (publication, answer) in publications {
        match push(&mut pipeline, &mut routes, shared, &publication).await {
            Ok(()) => waiting.push(answer),
            Err(error) => {
                let _ = answer.send(Err(error));
            }
        }
    }
    if pipeline.is_empty() {
        waiting.into_iter().for_each(|answer| drop(answer.send(Ok(()))));
        return Ok(());
    }
    let outcome: Result<(), BrokerError> = link.pipe(&pipeline).await;
    for answer in waiting {
        let _ = answer.send(match &outcome {
            Ok(()) => Ok(()),
            Err(error) => Err(link.gone(&format!("publishing failed: {error}"))),
        });
    }
    outcome
}

async fn push(
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
