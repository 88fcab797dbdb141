//! The first half of a task's way: a delivery is judged, told of, and waits for its time and its turn.

use serde_json::json;
use tokio::time::Instant;

use super::consumer::{Consumer, Received, Shown, Waiting};
use super::dispatch::{Refusal, Verdict, dispatch};
use super::hooks::{Incident, LogRecord, Notice, Report};
use super::request::Request;
use super::revoked::Revoked;
use super::shutdown::Phase;
use super::watch;
use crate::broker::{Command, Delivery, Settlement};
use crate::clock;
use crate::config::Hosting;
use crate::protocol::repr;

/// An `eta` further away than this is parked in the broker, where the broker can: nearer ones are not worth two commands.
const PARK_BEYOND: f64 = 10.0;
/// Parked requests of which remote control can show more than nothing; each costs its message.
const SHOWN: usize = 10_000;

impl Consumer {
    pub(super) fn on_delivery(&mut self, delivery: Delivery) {
        if self.shutdown.phase > Phase::Running {
            self.link.settle(delivery.handle.settle(Settlement::GiveBack));
            return;
        }
        let returns = self.returning.remove(&delivery.handle.tag());
        match dispatch(delivery, &self.rules) {
            Verdict::Refuse(refusal) => self.refuse(*refusal),
            Verdict::Request(request) if request.is_untranslated() => {
                if returns {
                    self.returning.insert(request.handle.tag());
                }
                self.ready.push_back(*request);
            }
            Verdict::Request(mut request) => {
                request.series = Some(self.counts.series(&request.headers.task, &request.info.queue));
                if returns {
                    self.admit(*request);
                    return;
                }
                self.counts.received(request.series);
                match request.policy.hosting {
                    Hosting::Strategy => self.host(*request),
                    Hosting::Native | Hosting::Request => self.on_request(*request),
                }
            }
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        let Refusal { delivery, incident, settlement } = refusal;
        watch::count_refusal(&mut self.counts, &incident);
        let report = Report { what: incident, message: delivery.message, info: delivery.info, pid: None };
        self.report(report, None, Some((delivery.handle, settlement)));
    }

    fn on_request(&mut self, request: Request) {
        if self.config.log_info {
            self.hooks.log(LogRecord {
                logger: "celery.worker.strategy",
                level: 20,
                message: format!("Task {} received", request.human()),
                data: Some(json!({
                    "id": request.headers.id,
                    "name": request.headers.display_name(),
                    "args": request.headers.argsrepr.as_deref().unwrap_or(""),
                    "kwargs": request.headers.kwargsrepr.as_deref().unwrap_or(""),
                    "eta": request.headers.eta,
                })),
                task: self.context(&request),
            });
        }
        // As in 5.7: what is revoked by a stamp is found out when its turn comes, after `task_received`.
        let now = request.expires.is_some() || self.revoked.contains(&request.headers.id);
        let request = if now { self.unless_revoked(request) } else { Some(request) };
        let Some(request) = request else { return };
        if request.policy.hosting == Hosting::Request {
            self.receive_hosted(request);
        } else if self.hooks.wants_received() || !self.receiving.is_empty() {
            let hooks = self.hooks.clone();
            self.receiving.push_back(Box::pin(async move {
                hooks.received(&request.message, &request.info).await;
                Received::Task(Box::new(request))
            }));
        } else {
            self.tell_received(&request);
            self.admit(request);
        }
    }

    pub(super) fn on_received(&mut self, received: Received) {
        match received {
            Received::Task(request) => {
                self.tell_received(&request);
                self.admit(*request);
            }
            Received::Refused(request, settlement) => self.link.settle(request.handle.settle(settlement)),
            Received::Command(message) => self.obey(&message),
        }
    }

    /// Gives the request back unless it is revoked or expired; then it is reported and gone.
    pub(super) fn unless_revoked(&mut self, request: Request) -> Option<Request> {
        let expired = request.expires.is_some_and(|expires| clock::now() > expires);
        let revoked = self.revoked.find(&request.headers);
        if !expired && revoked.is_none() {
            return Some(request);
        }
        self.counts.revoked(request.series);
        let by_header = match revoked {
            Some(Revoked::Stamp { name, value }) => {
                let header = json!({name: value}).to_string();
                let header = repr::saferepr(&header, None, 3).unwrap_or(header);
                format!(" (revoked by header: {header})")
            }
            Some(Revoked::Id) | None => String::new(),
        };
        if expired {
            let id = &request.headers.id;
            self.revoked.insert(id, Instant::now());
            self.hooks.notice(Notice::Revoked(vec![id.clone()]));
        }
        self.log_about(&request, 20, || format!("Discarding revoked task: {}{by_header}", request.human()));
        if let Some(ticket) = request.ticket {
            self.discard(request, ticket, expired);
            return None;
        }
        let reason = if expired { "expired" } else { "revoked" };
        let what = Incident::Revoked { reason, terminated: false, signal: None, expired };
        let report = Report { what, message: request.message, info: request.info, pid: None };
        self.report(report, None, Some((request.handle, Settlement::Ack)));
        None
    }

    /// A request that may run: at its time, at its turn, or now.
    fn admit(&mut self, request: Request) {
        if self.shutdown.phase > Phase::Running {
            self.link.settle(request.handle.settle(Settlement::GiveBack));
            return;
        }
        let now = clock::now();
        match request.eta {
            Some(eta) if eta > now => {
                // With a limit on them they are counted, as in Celery; parked ones are not. A parked request is
                // forgotten, and the object that the app has made of it would be made twice.
                let parks = self.link.broker().capabilities().parks
                    && self.config.eta_task_limit.is_none()
                    && request.ticket.is_none();
                if parks && eta > now + PARK_BEYOND && self.link.is_up() {
                    let Request { headers, message, info, handle, .. } = request;
                    let tag = handle.abandon();
                    self.link.send(Command::Park { tag, due: eta });
                    let shown =
                        (self.waiting.len() < SHOWN).then(|| Box::new(Shown { headers, message, info }));
                    self.waiting.push(eta, Waiting::Parked { tag, shown });
                } else {
                    self.etas += 1;
                    self.waiting.push(eta, Waiting::Eta(Box::new(request)));
                }
            }
            _ => self.take_turn(request, now),
        }
    }

    pub(super) fn take_turn(&mut self, request: Request, now: f64) {
        let rate = match self.rate_texts.is_empty() {
            true => request.policy.rate_limit,
            // It may have been changed since the request came.
            false => self.rules.tasks.get(&request.headers.task).and_then(|policy| policy.rate_limit),
        };
        let turn = match rate {
            Some(rate) if rate > 0.0 && self.config.rate_limits => {
                self.rate_limits.turn(&request.headers.task, rate, now)
            }
            _ => now,
        };
        if turn > now {
            self.limited += 1;
            self.waiting.push(turn, Waiting::Limited(Box::new(request)));
        } else {
            // What an event loop runs needs no process.
            if let Some(autoscaler) = self.autoscaler.as_mut().filter(|_| !request.policy.asynchronous) {
                autoscaler.received(Instant::now());
            }
            self.ready.push_back(request);
        }
    }
}
