//! The worker as remote control sees it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::consumer::{Consumer, Shown, Waiting};
use super::revoked::RevokedTasks;
use super::shutdown::Cause;
use crate::broker::topology::Queue;
use crate::broker::{Command, Publication};
use crate::cluster::clock::LamportClock;
use crate::config::TaskPolicy;
use crate::control::{self, Handled, Panel, PoolStats, Stage, Stats, TaskRequest, broker_stats};
use crate::pool::JobId;
use crate::protocol::Message;

impl Consumer {
    pub(super) fn on_control(&mut self, message: Message) {
        match control::handle(&message, self) {
            Handled::Done => {}
            Handled::Reply(publication) => self.publish(publication),
            Handled::Ask(request) => {
                let arguments = Value::Object(request.arguments.clone());
                self.ask(Some(request.clone()), request.method, arguments);
            }
        }
    }

    /// Asks the app; its answer, if one is wanted, is published.
    pub(super) fn ask(&mut self, request: Option<control::Request>, method: String, arguments: Value) {
        let hooks = self.hooks.clone();
        self.asking.spawn(async move {
            let answer = hooks.control(&method, arguments).await;
            request.map(|request| (request, answer))
        });
    }

    pub(super) fn on_answer(
        &mut self,
        answer: Result<Option<(control::Request, Option<Value>)>, tokio::task::JoinError>,
    ) {
        if let Ok(Some((request, answer))) = answer
            && let Some(publication) = control::answered(&request, answer, self)
        {
            self.publish(publication);
        }
    }

    fn publish(&mut self, publication: Box<Publication>) {
        // Nobody waits for a reply to arrive: who asked may be gone.
        let (done, _) = oneshot::channel();
        self.link.send(Command::Publish(publication, done));
    }

    fn change_policy(&mut self, task: &str, change: impl FnOnce(&mut TaskPolicy)) -> bool {
        let Some(policy) = self.rules.tasks.get_mut(task) else { return false };
        change(std::sync::Arc::make_mut(policy));
        true
    }

    fn change_prefetch(&mut self, slots: i64) {
        if self.prefetch > 0 {
            let change = slots * i64::from(self.config.prefetch_multiplier);
            self.prefetch = u32::try_from(i64::from(self.prefetch) + change).unwrap_or(1).max(1);
        }
    }
}

impl Panel for Consumer {
    fn node(&self) -> &str {
        &self.config.hostname
    }

    fn clock(&mut self) -> &mut LamportClock {
        &mut self.clock
    }

    fn revoked(&mut self) -> &mut RevokedTasks {
        &mut self.revoked
    }

    fn requests(&self) -> Vec<TaskRequest<'_>> {
        let active = self.jobs.active().map(|(_, job)| TaskRequest {
            headers: &job.request.headers,
            message: Some(&job.request.message),
            info: &job.request.info,
            stage: Stage::Active,
            time_start: Some(job.started),
            acknowledged: job.acknowledged,
            worker_pid: Some(job.pid),
        });
        let reserved = self.ready.iter().map(|request| (request, Stage::Reserved));
        let waiting = self.waiting.iter().filter_map(|(_, waiting)| match waiting {
            Waiting::Eta(request) => Some((&**request, Stage::Scheduled)),
            Waiting::Limited(request) => Some((&**request, Stage::Reserved)),
            Waiting::Parked { .. } | Waiting::Heartbeat => None,
        });
        let held = reserved.chain(waiting).map(|(request, stage)| TaskRequest {
            headers: &request.headers,
            message: Some(&request.message),
            info: &request.info,
            stage,
            time_start: None,
            acknowledged: false,
            worker_pid: None,
        });
        let parked = self.waiting.iter().filter_map(|(_, waiting)| match waiting {
            Waiting::Parked { shown: Some(shown), .. } => {
                let Shown { headers, message, info } = &**shown;
                Some(TaskRequest {
                    headers,
                    message: Some(message),
                    info,
                    stage: Stage::Scheduled,
                    time_start: None,
                    acknowledged: false,
                    worker_pid: None,
                })
            }
            Waiting::Parked { shown: None, .. }
            | Waiting::Eta(_)
            | Waiting::Limited(_)
            | Waiting::Heartbeat => None,
        });
        // What a child has yet to translate from protocol 1 has no name to be shown by.
        active.chain(held).chain(parked).filter(|shown| !shown.headers.task.is_empty()).collect()
    }

    fn queues(&self) -> Vec<Queue> {
        self.link.queues().to_vec()
    }

    fn stats(&self) -> Stats {
        Stats {
            total: self.totals.iter().map(|(name, count)| (name.clone(), *count)).collect(),
            uptime: Duration::try_from_secs_f64(self.uptime()).unwrap_or_default(),
            pool: PoolStats {
                name: self.pool.name().to_owned(),
                capacity: self.pool.capacity(),
                pids: self.pool.pids(),
                max_tasks_per_child: self.config.pool.max_tasks_per_child,
                timeouts: (self.config.soft_time_limit, self.config.time_limit),
                writes: self.totals.values().sum(),
                active: self.jobs.active().count(),
            },
            broker: broker_stats(&self.link.broker().address(), &self.config.broker),
            prefetch_count: self.wanted_prefetch(),
        }
    }

    fn tasks(&self) -> Vec<(String, Option<String>)> {
        self.rules
            .tasks
            .iter()
            .map(|(name, policy)| {
                let text = self.rate_texts.get(name).or(policy.rate_limit_text.as_ref());
                (name.clone(), text.filter(|_| policy.rate_limit.is_some()).cloned())
            })
            .collect()
    }

    fn default_signal(&self) -> i32 {
        self.config.shutdown.terminate_signal()
    }

    fn store_revoked(&mut self, ids: Vec<String>) {
        self.ask(None, "celeriac.store_revoked".to_owned(), json!({"ids": ids}));
    }

    fn terminate(&mut self, id: &str, signal: i32) {
        if !self.pool.interrupts() {
            tracing::error!(
                target: "celery.worker.control",
                "Task {id} cannot be terminated: the {} pool cannot interrupt a task. It runs to its end.",
                self.pool.name()
            );
            return;
        }
        let jobs: Vec<JobId> =
            self.jobs.active().filter(|(_, job)| job.request.headers.id == id).map(|(job, _)| job).collect();
        // A request that has not started is discarded when its turn comes: its id is revoked.
        for job in jobs {
            self.terminate_running(job, signal);
        }
    }

    fn rate_limit(&mut self, task: &str, rate: Option<f64>, text: &str) -> bool {
        self.rate_limits.reset(task);
        self.rate_texts.insert(task.to_owned(), text.to_owned());
        self.change_policy(task, |policy| policy.rate_limit = rate)
    }

    fn time_limit(&mut self, task: &str, soft: Option<f64>, hard: Option<f64>) -> bool {
        self.change_policy(task, |policy| {
            policy.soft_time_limit = soft;
            policy.time_limit = hard;
        })
    }

    fn add_consumer(&mut self, queue: Queue) {
        if self.link.queues().iter().all(|known| known.name != queue.name) {
            self.link.send(Command::Consume(Box::new(queue)));
        }
    }

    fn cancel_consumer(&mut self, queue: &str) {
        self.link.send(Command::Cancel(queue.to_owned()));
    }

    fn grow(&mut self, by: usize) -> Result<(), String> {
        self.pool.grow(by);
        self.change_prefetch(i64::try_from(by).unwrap_or(0));
        Ok(())
    }

    fn shrink(&mut self, by: usize) -> Result<(), String> {
        if by >= self.pool.capacity() {
            return Err(r#"ValueError("Can't shrink pool. All processes busy!")"#.to_owned());
        }
        self.pool.shrink(by);
        self.change_prefetch(-i64::try_from(by).unwrap_or(0));
        Ok(())
    }

    fn shutdown(&mut self) {
        tracing::warn!(target: "celery.worker.control", "Got shutdown from remote");
        self.on_cause(Cause::Remote);
    }
}
