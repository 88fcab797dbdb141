//! Stopping, as a state machine: which signal leads where. Decides, does nothing.
//!
//! Running → Warm: fetch nothing more, give back what has not started, let the running finish.
//! Running or Warm → Soft: as warm, for `worker_soft_shutdown_timeout` at most. Soft → Cold at its end or at the
//! next signal: running tasks are killed, late-acked ones go back to their queue. Cold → Hard: leave at once.

use crate::config::ShutdownConfig;

/// How far the stop has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No stop was asked for.
    #[default]
    Running,
    /// The running may finish.
    Warm,
    /// The running may finish until a timeout.
    Soft,
    /// The running are killed.
    Cold,
    /// Leave at once.
    Hard,
}

/// What asks for a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// SIGTERM.
    Term,
    /// SIGINT.
    Int,
    /// SIGQUIT.
    Quit,
    /// SIGHUP: stop and start again.
    Hup,
    /// The remote control command `shutdown`.
    Remote,
    /// The soft timeout is over.
    SoftTimeout,
    /// Something failed beyond repair; the exit status is 1.
    Failure,
    /// The app's own code in the worker's main process.
    App {
        /// The exit status it wants.
        code: i32,
    },
}

/// Where the worker is on its way out.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// How far it has come.
    pub phase: Phase,
    /// The exit status, once it is known.
    pub exit_code: i32,
    /// Start again afterwards.
    pub restart: bool,
    interrupted: bool,
}

/// What the step says to the terminal and to `worker_shutting_down`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Lines for the terminal, in order.
    pub lines: Vec<&'static str>,
    /// `(signal, how, exit status)` of the signal handler to be told.
    pub shutting_down: Option<(&'static str, &'static str, i32)>,
}

const WARM: &str = "worker: Warm shutdown (MainProcess)";
const COLD: &str = "worker: Cold shutdown (MainProcess)";
const INT_AGAIN: &str =
    "worker: Hitting Ctrl+C again will initiate cold shutdown, terminating all running tasks!";
const QUIT_AGAIN: &str = "worker: Hitting Ctrl+C again will terminate all running tasks!";
const PATIENCE: &str = "Waiting gracefully for cold shutdown to complete...";

impl Shutdown {
    /// Takes the next step. `busy`: whether tasks are running.
    pub fn step(&mut self, cause: Cause, busy: bool, config: &ShutdownConfig) -> Said {
        let cause = if cause == Cause::Term && config.term_is_quit { Cause::Quit } else { cause };
        match cause {
            Cause::Term | Cause::Remote | Cause::Hup | Cause::Failure | Cause::App { .. } => {
                let (code, lines, signal) = match cause {
                    Cause::Term => (0, vec![WARM], Some(("SIGTERM", "Warm", 0))),
                    Cause::Failure => (1, vec![], None),
                    Cause::App { code } => (code, vec![], None),
                    Cause::Hup => {
                        self.restart = true;
                        (0, vec![], None)
                    }
                    _ => (0, vec![], None),
                };
                if self.phase < Phase::Warm {
                    self.phase = Phase::Warm;
                    self.exit_code = code;
                }
                Said { lines, shutting_down: signal }
            }
            Cause::Int if !self.interrupted && self.phase < Phase::Soft => {
                self.interrupted = true;
                if self.phase < Phase::Warm {
                    self.phase = Phase::Warm;
                    self.exit_code = 1;
                }
                Said { lines: vec![INT_AGAIN, WARM], shutting_down: Some(("SIGINT", "Warm", 1)) }
            }
            Cause::Int | Cause::Quit => self.harder(cause, busy, config),
            Cause::SoftTimeout => {
                self.phase = self.phase.max(Phase::Cold);
                Said::default()
            }
        }
    }

    fn harder(&mut self, cause: Cause, busy: bool, config: &ShutdownConfig) -> Said {
        let signal = if cause == Cause::Int { "SIGINT" } else { "SIGQUIT" };
        match self.phase {
            Phase::Running | Phase::Warm => {
                let soft = config.soft_timeout > 0.0 && (busy || config.soft_on_idle);
                self.phase = if soft { Phase::Soft } else { Phase::Cold };
                let mut lines = vec![QUIT_AGAIN];
                // As in 5.7: the line is printed for SIGQUIT and not when the second Ctrl+C leads here.
                if cause == Cause::Quit {
                    lines.push(COLD);
                }
                Said { lines, shutting_down: Some((signal, "Cold", 1)) }
            }
            Phase::Soft => {
                self.phase = Phase::Cold;
                Said { lines: vec![PATIENCE], shutting_down: Some((signal, "Cold", 1)) }
            }
            Phase::Cold | Phase::Hard => {
                self.phase = Phase::Hard;
                Said::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(causes: &[Cause], busy: bool, config: &ShutdownConfig) -> (Phase, i32) {
        let mut shutdown = Shutdown::default();
        for cause in causes {
            shutdown.step(*cause, busy, config);
        }
        (shutdown.phase, shutdown.exit_code)
    }

    /// The rows CLI-X1 to X5 and CLI-D4 of Celery 5.7.
    #[test]
    fn signals_lead_where_celery_says_with_its_exit_status() {
        use Cause::{App, Int, Quit, Remote, SoftTimeout, Term};
        let plain = ShutdownConfig::default();
        let soft = ShutdownConfig { soft_timeout: 5.0, ..Default::default() };
        let remapped = ShutdownConfig { term_is_quit: true, ..Default::default() };
        for (causes, busy, config, expected) in [
            (&[Term][..], true, &plain, (Phase::Warm, 0)),
            (&[Remote], true, &plain, (Phase::Warm, 0)),
            (&[App { code: 3 }, Term], true, &plain, (Phase::Warm, 3)),
            (&[Term, Term], true, &plain, (Phase::Warm, 0)),
            (&[Int], true, &plain, (Phase::Warm, 1)),
            (&[Int, Int], true, &plain, (Phase::Cold, 1)),
            (&[Quit], true, &plain, (Phase::Cold, 0)),
            (&[Term, Quit], true, &plain, (Phase::Cold, 0)),
            (&[Quit, Quit], true, &plain, (Phase::Hard, 0)),
            (&[Quit], true, &soft, (Phase::Soft, 0)),
            (&[Quit], false, &soft, (Phase::Cold, 0)),
            (&[Quit, Quit], true, &soft, (Phase::Cold, 0)),
            (&[Quit, SoftTimeout], true, &soft, (Phase::Cold, 0)),
            (&[Quit, Quit, Quit], true, &soft, (Phase::Hard, 0)),
            (&[Term], true, &remapped, (Phase::Cold, 0)),
        ] {
            assert_eq!(after(causes, busy, config), expected, "{causes:?}");
        }
    }

    #[test]
    fn hup_restarts_and_a_later_term_does_not_undo_it() {
        let mut shutdown = Shutdown::default();
        shutdown.step(Cause::Hup, true, &ShutdownConfig::default());
        shutdown.step(Cause::Term, true, &ShutdownConfig::default());
        assert!(shutdown.restart);
        assert_eq!(shutdown.phase, Phase::Warm);
    }
}
