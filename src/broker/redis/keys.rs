//! Names of keys and channels, and which list a priority belongs to: kombu's layout and nothing else.

use super::options::Options;

/// The names of one database under one prefix.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    prefix: String,
    sep: String,
    steps: Vec<i64>,
    fanout: String,
    fanout_patterns: bool,
    /// Field -> `[envelope, exchange, routing key]`.
    pub(crate) unacked: String,
    /// Field -> the time it was taken, or last renewed.
    pub(crate) unacked_index: String,
    /// Our own: session of a worker -> its last sign of life, below 0 when it was found dead. One for each
    /// `unacked` hash, because who looks after a dead worker must look into the hash that it used.
    pub(crate) workers: String,
    /// Our own: what is revoked -> when that is forgotten.
    pub(crate) revoked: String,
}

impl Keys {
    pub(crate) fn new(options: &Options, db: i64) -> Self {
        let prefix = options.global_keyprefix.clone();
        Self {
            sep: options.sep.clone(),
            steps: options.priority_steps.clone(),
            fanout: options.fanout_prefix.replace("{db}", &db.to_string()),
            fanout_patterns: options.fanout_patterns,
            unacked: format!("{prefix}{}", options.unacked_key),
            unacked_index: format!("{prefix}{}", options.unacked_index_key),
            workers: format!("{prefix}celeriac.workers.{}", options.unacked_key),
            revoked: format!("{prefix}celeriac.revoked"),
            prefix,
        }
    }

    /// The list of a queue for messages of this priority.
    pub(crate) fn list(&self, queue: &str, priority: i64) -> String {
        match self.step(priority) {
            0 => format!("{}{queue}", self.prefix),
            step => format!("{}{queue}{}{step}", self.prefix, self.sep),
        }
    }

    /// All lists of these queues, step by step, in the order of the queues.
    pub(crate) fn lists<'a>(
        &'a self,
        queues: impl Iterator<Item = &'a str> + Clone + 'a,
    ) -> impl Iterator<Item = String> + 'a {
        self.steps.iter().flat_map(move |step| queues.clone().map(move |queue| self.list(queue, *step)))
    }

    /// The lists of one queue.
    pub(crate) fn lists_of(&self, queue: &str) -> Vec<String> {
        self.lists(std::iter::once(queue)).collect()
    }

    // Python's `steps[bisect(steps, n) - 1]`, whose index -1 is the last step.
    fn step(&self, priority: i64) -> i64 {
        let above = self.steps.partition_point(|step| *step <= priority);
        self.steps.get(above.wrapping_sub(1)).or(self.steps.last()).copied().unwrap_or(0)
    }

    pub(crate) fn binding(&self, exchange: &str) -> String {
        format!("{}_kombu.binding.{exchange}", self.prefix)
    }

    pub(crate) fn binding_permanent(&self, exchange: &str) -> String {
        format!("{}_kombu.binding_permanent.{exchange}", self.prefix)
    }

    pub(crate) fn binding_deadlines(&self) -> String {
        format!("{}_kombu.binding_deadlines", self.prefix)
    }

    /// A member of a binding table.
    pub(crate) fn binding_member(&self, routing_key: &str, pattern: &str, queue: &str) -> String {
        [routing_key, pattern, queue].join(&self.sep)
    }

    /// The parts of a member of a binding table: routing key, pattern, queue.
    pub(crate) fn binding_parts<'a>(&self, member: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
        let mut parts = member.split(&self.sep);
        let found = (parts.next()?, parts.next()?, parts.next()?);
        parts.next().is_none().then_some(found)
    }

    /// The channel of a fanout exchange.
    pub(crate) fn channel(&self, exchange: &str, routing_key: &str) -> String {
        let (prefix, fanout) = (&self.prefix, &self.fanout);
        if routing_key.is_empty() || !self.fanout_patterns {
            format!("{prefix}{fanout}{exchange}")
        } else {
            format!("{prefix}{fanout}{exchange}/{routing_key}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(options: Options) -> Keys {
        Keys::new(&options, 7)
    }

    #[test]
    fn a_priority_goes_to_the_list_of_the_step_below_it() {
        let keys = keys(Options::default());
        for (priority, list) in [
            (0, "q"),
            (2, "q"),
            (3, "q\u{6}\u{16}3"),
            (5, "q\u{6}\u{16}3"),
            (8, "q\u{6}\u{16}6"),
            (9, "q\u{6}\u{16}9"),
        ] {
            assert_eq!(keys.list("q", priority), list);
        }
    }

    #[test]
    fn below_the_first_step_the_last_one_is_used_as_python_does() {
        let keys = keys(Options { priority_steps: vec![3, 6], sep: ":".to_owned(), ..Options::default() });
        assert_eq!(keys.list("q", 0), "q:6");
    }

    #[test]
    fn lists_are_asked_by_priority_first_and_queue_second() {
        let options = Options { priority_steps: vec![0, 9], sep: ":".to_owned(), ..Options::default() };
        let lists: Vec<String> = keys(options).lists(["a", "b"].into_iter()).collect();
        assert_eq!(lists, ["a", "b", "a:9", "b:9"]);
    }

    #[test]
    fn the_prefix_comes_before_every_name() {
        let keys = keys(Options { global_keyprefix: "app_".to_owned(), ..Options::default() });
        assert_eq!(keys.list("q", 0), "app_q");
        assert_eq!(keys.unacked, "app_unacked");
        assert_eq!(keys.revoked, "app_celeriac.revoked");
        assert_eq!(keys.binding("celery"), "app__kombu.binding.celery");
        assert_eq!(keys.channel("celery.pidbox", ""), "app_/7.celery.pidbox");
        assert_eq!(keys.channel("celeryev", "worker.*"), "app_/7.celeryev/worker.*");
    }

    #[test]
    fn binding_members_survive_the_round_trip() {
        let keys = keys(Options::default());
        let member = keys.binding_member("a.*", r"^a\.[^\.]+$", "q");
        assert_eq!(keys.binding_parts(&member), Some(("a.*", r"^a\.[^\.]+$", "q")));
        assert_eq!(keys.binding_parts("garbage"), None);
    }
}
