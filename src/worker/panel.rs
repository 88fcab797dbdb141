//! The worker as remote control sees it.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::consumer::{Consumer, Shown, Waiting};
use super::hooks::{Notice, Unstarted};
use super::revoked::RevokedTasks;
use super::shutdown::Cause;
use crate::broker::topology::Queue;
use crate::broker::{Command, Remembrance};
use crate::clock;
use crate::cluster::clock::LamportClock;
use crate::config::TaskPolicy;
use crate::control::{Panel, PoolStats, Stage, Stats, TaskRequest, broker_stats};
use crate::pool::JobId;

impl Consumer {
    /// What workers before this one were told to revoke.
    pub(super) fn recall(&mut self, ids: Vec<String>) {
        let now = Instant::now();
        let news: Vec<String> = ids.into_iter().filter(|id| !self.revoked.contains(id)).collect();
        news.iter().for_each(|id| self.revoked.insert(id, now));
        if !news.is_empty() {
            tracing::debug!(target: "celery.worker", count = news.len(), "The broker remembers revoked tasks.");
            self.hooks.notice(Notice::Revoked(news));
        }
    }

    /// Has the broker remember revokes, each for so many seconds, where it can.
    fn remember(&mut self, entries: Vec<(String, f64)>) {
        if self.link.broker().capabilities().remembers && !entries.is_empty() {
            let most = self.revoked.bounds().most;
            self.link.send(Command::Remember(Remembrance { entries, most }));
        }
    }

    fn change_policy(&mut self, task: &str, change: impl FnOnce(&mut TaskPolicy)) -> bool {
        let Some(policy) = self.rules.tasks.get_mut(task) else { return false };
        change(std::sync::Arc::make_mut(policy));
        true
    }

    /// For so many slots more or less.
    pub(super) fn change_prefetch(&mut self, slots: i64) {
        self.add_prefetch(slots.saturating_mul(i64::from(self.config.prefetch_multiplier)));
    }

    /// By so many messages; a prefetch without a bound stays one.
    pub(super) fn add_prefetch(&mut self, messages: i64) {
        if self.prefetch > 0 {
            let changed = i64::from(self.prefetch).saturating_add(messages);
            self.prefetch = u32::try_from(changed.max(1)).unwrap_or(u32::MAX);
        }
    }

    /// Why the pool cannot change its size, if it cannot.
    fn fixed(&self) -> Result<(), String> {
        match self.pool.name() {
            "prefork" | "gevent" | "eventlet" | "native" => Ok(()),
            name => Err(format!(
                "NotImplementedError('the {name} pool has the size that it was started with: restart the worker with another -c')"
            )),
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

    fn revoke(&mut self, ids: &[String]) {
        let wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
        let now = clock::now();
        let waits = self.waiting.iter().filter_map(|(at, waiting)| match waiting {
            Waiting::Eta(request) | Waiting::Limited(request) => {
                Some((request.headers.id.as_str(), at - now))
            }
            Waiting::Parked { shown, .. } => Some((shown.as_ref()?.headers.id.as_str(), at - now)),
        });
        let waits: HashMap<&str, f64> = waits.filter(|(id, _)| wanted.contains(id)).collect();
        let bounds = self.revoked.bounds();
        let entry = |id: &String| (id.clone(), bounds.lasts(waits.get(id.as_str()).copied().unwrap_or(0.0)));
        let entries = ids.iter().map(entry).collect();
        ids.iter().for_each(|id| self.revoked.insert(id, Instant::now()));
        self.hooks.notice(Notice::Revoked(ids.to_vec()));
        self.remember(entries);
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
            Waiting::Parked { .. } => None,
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
            Waiting::Parked { shown: None, .. } | Waiting::Eta(_) | Waiting::Limited(_) => None,
        });
        let hosted = self.desk.shown().map(|shown| TaskRequest {
            headers: &shown.request.headers,
            message: Some(&shown.request.message),
            info: &shown.request.info,
            stage: if shown.running.is_some() { Stage::Active } else { Stage::Reserved },
            time_start: shown.running.map(|(started, _)| started),
            acknowledged: shown.settled,
            worker_pid: shown.running.map(|(_, pid)| pid),
        });
        // What a child has yet to translate from protocol 1 has no name to be shown by.
        active
            .chain(held)
            .chain(parked)
            .chain(hosted)
            .filter(|shown| !shown.headers.task.is_empty())
            .collect()
    }

    fn queues(&self) -> Vec<Queue> {
        self.link.queues().to_vec()
    }

    fn stats(&self) -> Stats {
        Stats {
            total: self.counts.totals().map(|(name, count)| (name.to_owned(), count)).collect(),
            uptime: Duration::try_from_secs_f64(self.uptime()).unwrap_or_default(),
            pool: PoolStats {
                name: self.pool.name().to_owned(),
                capacity: self.pool.capacity(),
                pids: self.pool.pids(),
                max_tasks_per_child: self.config.pool.max_tasks_per_child,
                timeouts: (self.config.soft_time_limit, self.config.time_limit),
                writes: self.counts.totals().map(|(_, count)| count).sum(),
                active: self.jobs.active().count() + self.desk.running(),
            },
            broker: broker_stats(&self.link.broker().address(), &self.config.broker),
            prefetch_count: self.wanted_prefetch().unwrap_or(0),
            autoscaler: self.autoscaler_shown(),
        }
    }

    fn app_has_stats(&self) -> bool {
        self.config.app_has_stats
    }

    fn tasks(&self) -> Vec<(String, Option<String>)> {
        self.rules
            .tasks
            .iter()
            .map(|(name, policy)| {
                let changed = self.rate_texts.get(name);
                (name.clone(), changed.unwrap_or(&policy.rate_limit_text).clone())
            })
            .collect()
    }

    fn default_signal(&self) -> i32 {
        self.config.shutdown.terminate_signal()
    }

    fn store_revoked(&mut self, tasks: Vec<Unstarted>) {
        self.storing = tasks;
    }

    fn terminate(&mut self, id: &str, signal: i32) -> Result<(), String> {
        let jobs: Vec<JobId> =
            self.jobs.active().filter(|(_, job)| job.request.headers.id == id).map(|(job, _)| job).collect();
        if (!jobs.is_empty() || self.desk.runs(id)) && !self.pool.interrupts() {
            let name = self.pool.name();
            return Err(format!("NotImplementedError('the {name} pool cannot end a task that runs')"));
        }
        // A request that has not started is discarded when its turn comes: its id is revoked.
        for job in jobs {
            self.terminate_running(job, signal);
        }
        self.terminate_hosted(id, signal);
        Ok(())
    }

    fn rate_limit(&mut self, task: &str, rate: Option<f64>, text: Option<&str>) -> bool {
        if !self.change_policy(task, |policy| policy.rate_limit = rate) {
            return false;
        }
        self.rate_texts.insert(task.to_owned(), text.map(str::to_owned));
        self.rate_limits.reset(task);
        // Those that wait for their turn get another, in their order.
        let (again, others): (Vec<_>, Vec<_>) = self.waiting.drain_sorted().into_iter().partition(
            |(_, waiting)| matches!(waiting, Waiting::Limited(request) if request.headers.task == task),
        );
        for (at, waiting) in others {
            self.waiting.push(at, waiting);
        }
        let now = clock::now();
        for (_, waiting) in again {
            if let Waiting::Limited(request) = waiting {
                self.limited -= 1;
                self.take_turn(*request, now);
            }
        }
        true
    }

    fn time_limit(&mut self, task: &str, soft: Option<f64>, hard: Option<f64>) -> bool {
        self.change_policy(task, |policy| {
            policy.soft_time_limit = soft;
            policy.time_limit = hard;
        })
    }

    fn cancel_consumer(&mut self, queue: &str) {
        self.cancel_queue(queue);
    }

    fn autoscales(&self) -> bool {
        self.autoscaler.is_some()
    }

    fn autoscale(&mut self, max: Option<u32>, min: Option<u32>) -> Option<(usize, usize)> {
        self.change_autoscale(max, min)
    }

    fn grow(&mut self, by: usize) -> Result<(), String> {
        self.fixed()?;
        self.pool.grow(by);
        self.change_prefetch(i64::try_from(by).unwrap_or(0));
        Ok(())
    }

    fn shrink(&mut self, by: usize) -> Result<(), String> {
        self.fixed()?;
        if by >= self.pool.capacity() {
            return Err(r#"ValueError("Can't shrink pool. All processes busy!")"#.to_owned());
        }
        self.pool.shrink(by);
        self.change_prefetch(-i64::try_from(by).unwrap_or(0));
        Ok(())
    }

    fn enable_events(&mut self) -> Option<bool> {
        let enabled = self.events.dispatcher.as_mut()?.enable_tasks();
        if enabled {
            self.hooks.notice(Notice::Events { tasks: true });
        }
        Some(enabled)
    }

    fn disable_events(&mut self) -> Option<bool> {
        let disabled = self.events.dispatcher.as_mut()?.disable_tasks();
        if disabled {
            self.hooks.notice(Notice::Events { tasks: false });
        }
        Some(disabled)
    }

    fn send_heartbeat(&mut self) {
        self.beat_as_asked();
    }

    fn elect(&mut self, id: &str, topic: &str, action: Value) {
        self.call_election(id, topic, action);
    }

    fn shutdown(&mut self) {
        tracing::warn!(target: "celery.worker.control", "Got shutdown from remote");
        self.on_cause(Cause::Remote);
    }
}
