//! Remote control where it has to wait: for the app (its own commands, messages that are not JSON, queues that it
//! declares) and for the broker (a queue that is to be consumed). Each wait ends in [`Consumer::on_asked`].

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinError;

use super::consumer::{Consumer, Received};
use super::dispatch::{accepts, untrusted};
use super::hooks::{Incident, Report};
use super::link::Consuming;
use crate::broker::topology::Queue;
use crate::broker::{Command, Publication};
use crate::control::{self, Handled, Request};
use crate::protocol::{DeliveryInfo, Message, repr};

pub(super) const JSON: &str = "application/json";

/// What was waited for.
pub(super) enum Asked {
    /// The app has stored what was revoked; this is the reply that waited for it.
    Stored(Option<Box<Publication>>),
    /// The app's answer to a command; without a request nobody wants it.
    Answered(Option<Request>, Option<Value>),
    /// A control message as the app decodes it; none: it cannot.
    Opened(Box<Message>, Option<Value>),
    /// What was heard on a queue, as the app decodes it; none: it cannot.
    Overheard(String, Option<Value>),
    /// A reply as the app encodes it; none: it cannot.
    Sealed(Box<Publication>, Option<Value>),
    /// The queue that the app means, or why there is none; none: the app does not say.
    Declared(Request, Box<Queue>, Option<Value>),
    /// The broker's answer to that queue.
    Consumed(Request, String, Consuming),
}

impl Consumer {
    pub(super) fn on_control(&mut self, message: Message) {
        let content_type = message.content_type.as_deref().unwrap_or(super::request::DATA);
        if !accepts(&self.rules.accept, content_type) {
            let exception = format!("ContentDisallowed({})", repr::repr(&untrusted(content_type)));
            self.cannot_open(message, exception);
        } else if content_type == JSON {
            self.obey_in_turn(message);
        } else {
            let sealed = json!({
                "content_type": content_type,
                "content_encoding": message.content_encoding,
                "body": BASE64.encode(&message.body),
            });
            let hooks = self.hooks.clone();
            self.asking.spawn(async move {
                let opened = hooks.control("celeriac.open", sealed).await;
                Asked::Opened(Box::new(message), opened)
            });
        }
    }

    /// A command sees every task that came before it, so it waits with those that the app is being told of.
    fn obey_in_turn(&mut self, message: Message) {
        if self.receiving.is_empty() {
            self.obey(&message);
        } else {
            self.receiving.push_back(Box::pin(std::future::ready(Received::Command(message))));
        }
    }

    pub(super) fn obey(&mut self, message: &Message) {
        let handled = control::handle(message, self);
        if !self.storing.is_empty() {
            let tasks = std::mem::take(&mut self.storing);
            let reply = if let Handled::Reply(publication) = handled { Some(publication) } else { None };
            let hooks = self.hooks.clone();
            self.asking.spawn(async move {
                hooks.store_revoked(tasks).await;
                Asked::Stored(reply)
            });
            return;
        }
        match handled {
            Handled::Done => {}
            Handled::Reply(publication) => self.reply(publication),
            Handled::Ask(request) => {
                let arguments = Value::Object(request.arguments.clone());
                self.ask(Some(request.clone()), request.method, arguments);
            }
            Handled::Consume(request, queue) => self.declare(request, queue),
        }
    }

    /// Has the app declare the queue that is to be consumed.
    pub(super) fn declare(&mut self, request: Request, queue: Box<Queue>) {
        let hooks = self.hooks.clone();
        let arguments = Value::Object(request.arguments.clone());
        self.asking.spawn(async move {
            let declared = hooks.control("celeriac.declare", arguments).await;
            Asked::Declared(request, queue, declared)
        });
    }

    fn opened(&mut self, message: Message, opened: Option<Value>) {
        match opened.map(serde_json::from_value::<Result<Value, String>>) {
            Some(Ok(Ok(body))) => {
                let body = Bytes::from(body.to_string());
                self.obey_in_turn(Message { body, content_type: Some(JSON.to_owned()), ..message });
            }
            Some(Ok(Err(exception))) => self.cannot_open(message, exception),
            Some(Err(_)) | None => {
                let exception = "DecodeError('only JSON is read here')".to_owned();
                self.cannot_open(message, exception);
            }
        }
    }

    /// A control message that may not or cannot be read: one line, as of any other message.
    fn cannot_open(&mut self, message: Message, exception: String) {
        let what = Incident::Undecodable { reason: exception };
        self.report(Report { what, message, info: DeliveryInfo::default(), pid: None }, None, None);
    }

    /// Asks the app; its answer, if one is wanted, is published.
    pub(super) fn ask(&mut self, request: Option<Request>, method: String, arguments: Value) {
        let hooks = self.hooks.clone();
        self.asking.spawn(async move {
            let answer = hooks.control(&method, arguments).await;
            Asked::Answered(request, answer)
        });
    }

    pub(super) fn on_asked(&mut self, asked: Result<Asked, JoinError>) {
        let Ok(asked) = asked else { return };
        let reply = match asked {
            Asked::Stored(reply) => reply,
            Asked::Answered(None, _) => None,
            Asked::Answered(Some(request), answer) => control::answered(&request, answer, self),
            Asked::Opened(message, opened) => {
                self.opened(*message, opened);
                None
            }
            Asked::Overheard(queue, opened) => {
                match opened.map(serde_json::from_value::<Result<Value, String>>) {
                    Some(Ok(Ok(body))) => self.overheard(&queue, &body),
                    Some(Ok(Err(exception))) => {
                        tracing::error!(target: "celery.worker.consumer.gossip", "{exception}");
                    }
                    Some(Err(_)) | None => tracing::error!(
                        target: "celery.worker.consumer.gossip",
                        "A message of another worker is not JSON, which is all that is read here."
                    ),
                }
                None
            }
            // The app has said in its log why it could not.
            Asked::Sealed(_, None) => None,
            Asked::Sealed(publication, Some(sealed)) => return self.send_sealed(publication, &sealed),
            Asked::Declared(request, queue, declared) => self.consume(request, *queue, declared),
            Asked::Consumed(request, queue, Ok(())) => {
                tracing::info!(target: "celery.worker.consumer.consumer", "Started consuming from {queue}");
                control::consumed(&request, Ok(()), self)
            }
            Asked::Consumed(request, queue, Err(error)) => {
                self.forget_queue(&queue);
                let kind = if error.is_retryable() { "OperationalError" } else { "ChannelError" };
                let exception = format!("{kind}({})", repr::repr(error.reason()));
                control::consumed(&request, Err(exception), self)
            }
        };
        if let Some(publication) = reply {
            self.reply(publication);
        }
    }

    /// Consumes a queue, or tells at once what came of it.
    fn consume(
        &mut self,
        request: Request,
        queue: Queue,
        declared: Option<Value>,
    ) -> Option<Box<Publication>> {
        let queue = match declared.map(serde_json::from_value::<Result<Queue, String>>) {
            None => queue,
            Some(Ok(Ok(queue))) => queue,
            Some(Ok(Err(exception))) => return control::consumed(&request, Err(exception), self),
            Some(Err(error)) => {
                let exception = format!("ValueError({})", repr::repr(&error.to_string()));
                return control::consumed(&request, Err(exception), self);
            }
        };
        if self.link.queues().iter().any(|known| known.name == queue.name) {
            return control::consumed(&request, Ok(()), self);
        }
        let name = queue.name.clone();
        let (answer, heard) = oneshot::channel::<Consuming>();
        self.link.consume(queue, answer);
        self.asking.spawn(async move {
            match heard.await {
                Ok(outcome) => Asked::Consumed(request, name, outcome),
                // The link is closed; nobody can be told any more.
                Err(_) => Asked::Answered(None, None),
            }
        });
        None
    }

    /// Consumes a queue that the app's own code has declared; nobody waits for what comes of it.
    pub(super) fn consume_for_app(&mut self, queue: Queue) {
        if self.link.queues().iter().any(|known| known.name == queue.name) {
            return;
        }
        let name = queue.name.clone();
        let (answer, heard) = oneshot::channel::<Consuming>();
        self.link.consume(queue, answer);
        self.asking.spawn(async move {
            if let Ok(Err(error)) = heard.await {
                tracing::error!(
                    target: "celery.worker.consumer.consumer",
                    "Cannot consume from {name}: {}",
                    error.reason()
                );
            }
            Asked::Answered(None, None)
        });
    }

    /// Stops consuming the queue that is named or called so.
    pub(super) fn cancel_queue(&mut self, called: &str) {
        tracing::info!(target: "celery.worker.consumer.consumer", "Canceling queue {called}");
        let known = self.link.queues().iter().find(|queue| queue.is_called(called));
        let name = known.map_or_else(|| called.to_owned(), |queue| queue.name.clone());
        self.link.send(Command::Cancel(name));
        self.forget_queue(called);
    }

    /// Tells the app that a queue is not consumed.
    fn forget_queue(&mut self, called: &str) {
        self.ask(None, "celeriac.deselect".to_owned(), json!({"queue": called}));
    }

    /// Publishes a reply, or a request of our own, in the app's serializer.
    pub(super) fn reply(&mut self, publication: Box<Publication>) {
        let serializer = self.config.control.as_ref().map_or("json", |control| &control.serializer);
        if serializer == "json" {
            return self.publish(publication);
        }
        let plain = String::from_utf8_lossy(&publication.message.body).into_owned();
        let arguments = json!({"serializer": serializer, "body": plain});
        let hooks = self.hooks.clone();
        self.asking.spawn(async move {
            let sealed = hooks.control("celeriac.seal", arguments).await;
            Asked::Sealed(publication, sealed)
        });
    }

    fn send_sealed(&mut self, mut publication: Box<Publication>, sealed: &Value) {
        let text = |name: &str| sealed.get(name).and_then(Value::as_str);
        let Some(body) = text("body").and_then(|body| BASE64.decode(body).ok()) else { return };
        let message = &mut publication.message;
        message.body = body.into();
        message.content_type = text("content_type").map(str::to_owned);
        message.content_encoding = text("content_encoding").map(str::to_owned);
        self.publish(publication);
    }

    fn publish(&mut self, publication: Box<Publication>) {
        // Nobody waits for a reply to arrive: who asked may be gone.
        let (done, _) = oneshot::channel();
        self.link.send(Command::Publish(publication, done));
    }
}
