//! Redis, spoken natively in kombu's layout: `redis://`, `rediss://`, `redis+socket://`.
//!
//! What always holds: a message is in its list or in `unacked`, whatever dies and whenever, because it moves
//! between them only within scripts (`lua/`). A claimed message has a field of its own in `unacked`, so that
//! nobody settles what another holds. What a live session holds is renewed; what a dead one held is put back by
//! any other worker of ours within seconds, or by a stock worker after the visibility timeout.
//!
//! A session has one connection for commands, and one more for what is published. It waits without polling: the
//! server tells it when one of the lists is changed (`CLIENT TRACKING`, RESP3).

pub(crate) mod address;
mod batch;
mod keys;
pub(crate) mod link;
pub(crate) mod options;
mod publish;
mod remember;
mod restore;
mod routes;
mod session;
mod shared;
mod sweep;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use async_trait::async_trait;
use redis::ProtocolVersion;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::address::{Address, Place, Tls};
use self::keys::Keys;
use self::link::{Dialer, Link, MOVE, REGISTER};
use self::options::Options;
use self::restore::{End, Guard};
use self::session::Live;
use self::shared::Shared;
use super::{
    Broker, BrokerConfig, COMMAND_CAPACITY, Capabilities, Consume, EVENT_CAPACITY, Event, Session, Tag,
};
use crate::error::{BrokerError, mask};

/// A Redis server as broker.
pub struct RedisBroker {
    client: redis::Client,
    shared: Arc<Shared>,
}

impl RedisBroker {
    /// A broker at this address, or none when the scheme is another.
    ///
    /// # Errors
    /// [`BrokerError::Address`] when the address or an option is wrong, or asks for what is not supported.
    pub fn new(url: &str, config: &BrokerConfig) -> Result<Option<Self>, BrokerError> {
        let wrong = |reason: String| BrokerError::Address { address: mask(url), reason };
        match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("redis" | "rediss" | "redis+socket" | "socket") => {}
            // Sentinel among them: kombu speaks it.
            _ => return Ok(None),
        }
        let mut address = Address::parse(url).map_err(wrong)?;
        let told = address.use_ssl(&config.use_ssl).map_err(wrong)?;
        if address.tls.is_some() && !told && matches!(address.place, Place::Tcp { .. }) {
            tracing::warn!(target: "celeriac.redis", address = address.masked(),
                "rediss:// without ssl_cert_reqs: the server's certificate is not verified, as in Celery.");
            address.tls = Some(Tls::insecure());
        }
        let mut options = Options::read(&config.transport_options, &address.query).map_err(wrong)?;
        if options.socket.connect_timeout.is_none() {
            let timeout = config.connection_timeout.filter(|timeout| *timeout > 0.0);
            options.socket.connect_timeout =
                timeout.and_then(|timeout| std::time::Duration::try_from_secs_f64(timeout).ok());
        }
        let client = address.client(ProtocolVersion::RESP3, &options.socket).map_err(wrong)?;
        let keys = Keys::new(&options, address.db);
        let shared = Arc::new(Shared::new(keys, options, &address.masked()));
        Ok(Some(Self { client, shared }))
    }

    /// Takes over what earlier sessions of this worker hold: what the worker still has comes along, the rest goes
    /// back to its queues. Answers the tags that are gone.
    async fn take_over(
        &self,
        link: &Link,
        session: u64,
        before: Vec<u64>,
        held: &HashSet<Tag>,
    ) -> Result<Vec<Tag>, BrokerError> {
        let shared = &*self.shared;
        let mut missing: Vec<Tag> = held.iter().copied().collect();
        missing.sort_unstable();
        let unconfirmed = std::mem::take(&mut *shared.unconfirmed());
        if let Err(error) = delete(link, shared, &unconfirmed).await {
            shared.unconfirmed().extend(unconfirmed);
            return Err(error);
        }
        for old in before {
            let owner = shared.owner(old);
            // First of all: whatever of the old session is still on its way takes nothing any more.
            let marked = restore::mark_dead(link, shared, &owner, None).await?;
            let mut gone = Vec::new();
            for tags in missing.chunks(500) {
                let mut call = shared.call();
                call.arg(shared.owner(session)).arg(0);
                for tag in tags {
                    call.arg(shared.field(old, *tag)).arg(shared.field(session, *tag)).arg("");
                }
                let moved: Option<Vec<Option<i64>>> = link.eval(&MOVE, &call).await?;
                let moved = moved.ok_or_else(|| link.gone("the session was declared dead"))?;
                gone.extend(tags.iter().zip(moved).filter(|(_, moved)| moved.is_none()).map(|(tag, _)| *tag));
            }
            missing = gone;
            if let Some(score) = marked {
                let count = restore::bury(link, shared, &owner, &score).await?;
                if count > 0 {
                    tracing::info!(target: "celeriac.redis", count,
                        "Gave back messages that the lost connection had taken but not delivered.");
                }
            }
            shared.ended(old);
        }
        Ok(missing)
    }
}

/// Deletes the records of what is settled.
async fn delete(link: &Link, shared: &Shared, fields: &[String]) -> Result<(), BrokerError> {
    for fields in fields.chunks(1000) {
        let mut pipeline = redis::pipe();
        pipeline.atomic();
        pipeline.hdel(&shared.keys.unacked, fields).ignore();
        pipeline.zrem(&shared.keys.unacked_index, fields).ignore();
        link.pipe::<()>(&pipeline).await?;
    }
    Ok(())
}

#[async_trait]
impl Broker for RedisBroker {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            settles_across_sessions: true,
            parks: true,
            fanout: true,
            remembers: true,
            listens: true,
        }
    }

    fn address(&self) -> String {
        self.shared.address.to_string()
    }

    async fn connect(&self, consume: &Consume) -> Result<Session, BrokerError> {
        let shared = Arc::clone(&self.shared);
        let (dialer, pushes) = Dialer::new(&self.client, Arc::clone(&shared.address), &shared.options);
        let link = dialer.connect().await?;
        let tracking = link.track().await;
        let (session, before) = shared.begin();
        let owner = shared.owner(session);
        let mut register = link::Call::new([shared.keys.workers.as_str()]);
        register.arg(&owner);
        let began: f64 = link.eval(&REGISTER, &register).await?;

        // Asked for, and the answer was lost: back to their queues, with what the worker does not hold.
        let halfway: HashSet<Tag> = shared.unparking().clone();
        let mut held: HashSet<Tag> = {
            let (parked, fleeting) = (shared.parked(), shared.fleeting());
            let ours =
                |tag: &&Tag| !parked.contains(tag) && !fleeting.contains(tag) && !halfway.contains(tag);
            consume.held.iter().filter(ours).copied().collect()
        };
        let mut gone = self.take_over(&link, session, before, &held).await?;
        if !halfway.is_empty() {
            let fields: Vec<String> = halfway.iter().map(|tag| shared.parked_field(*tag)).collect();
            restore::put_back(&link, &shared, &fields, End::Head, Guard::Ours).await?;
            shared.unparking().clear();
            gone.extend(halfway);
        }
        for tag in &gone {
            held.remove(tag);
        }

        let (events, receiver) = mpsc::channel(EVENT_CAPACITY);
        let (sender, commands) = mpsc::channel(COMMAND_CAPACITY);
        let (findings, sweeps) = mpsc::channel(1);
        let (failure, failed) = mpsc::channel(1);
        let mut live =
            Live::new(link.clone(), dialer, Arc::clone(&shared), session, pushes, tracking, events, commands);
        live.held = held;
        live.prefetch = consume.prefetch;
        live.paused = consume.paused;
        live.remembrances = std::mem::take(&mut *shared.unremembered());
        let remembered = remember::recall(&link, &shared, began).await?;
        if !remembered.is_empty() {
            live.emit(Event::Remembered(remembered));
        }
        live.findings = Some(findings);
        live.failed = failed;
        for queue in &consume.queues {
            live.consume(queue).await?;
        }
        if let Some(control) = &consume.control {
            live.listen(&consume.node, control).await?;
        }
        if !gone.is_empty() {
            live.emit(Event::Forgotten(gone));
        }
        let sweeper = sweep::Sweeper {
            link,
            shared,
            findings: sweeps,
            came_back: (session > 1).then_some(began),
            again: live.again(),
            seen: HashMap::new(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = sweeper.run().await {
                let _ = failure.send(error).await;
            }
        });
        tasks.spawn(live.run());
        Ok(Session { events: receiver, commands: sender, tasks })
    }
}
