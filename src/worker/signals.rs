//! The signals of the worker's process.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;

use super::hooks::{Hooks, Notice};
use super::shutdown::Cause;
use crate::error::Error;

/// Listens until the set is dropped. SIGHUP is left alone where a terminal's end must not restart the worker.
pub(super) fn listen(
    tasks: &mut JoinSet<()>,
    causes: &UnboundedSender<Cause>,
    hooks: Arc<dyn Hooks>,
    hup_restarts: bool,
) -> Result<(), Error> {
    let mut wanted = vec![
        (SignalKind::terminate(), Cause::Term),
        (SignalKind::interrupt(), Cause::Int),
        (SignalKind::quit(), Cause::Quit),
    ];
    if hup_restarts {
        wanted.push((SignalKind::hangup(), Cause::Hup));
    }
    for (kind, cause) in wanted {
        let mut signal = install(kind)?;
        let causes = causes.clone();
        tasks.spawn(async move { while signal.recv().await.is_some() && causes.send(cause).is_ok() {} });
    }
    let mut cry = install(SignalKind::user_defined1())?;
    tasks.spawn(async move {
        while cry.recv().await.is_some() {
            hooks.notice(Notice::Cry);
        }
    });
    Ok(())
}

fn install(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|error| Error::Internal(format!("signal {}: {error}", kind.as_raw_value())))
}
