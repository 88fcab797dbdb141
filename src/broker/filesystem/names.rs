//! What the files are called: `<milliseconds>_<uuid>.<queue>.msg`, as kombu has it. The milliseconds are those of
//! the monotonic clock, and order the queue.

use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

/// A waiting message: sorts as it is to be consumed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileName {
    milliseconds: u64,
    name: String,
}

impl FileName {
    /// The queue of a file, if it is a message at all.
    pub(super) fn parse(name: &str) -> Option<(Self, &str)> {
        let (stamp, rest) = name.split_once('.')?;
        let queue = rest.strip_suffix(".msg")?;
        // kombu takes any name with the right ending; one that starts otherwise is nobody's first.
        let milliseconds =
            stamp.split_once('_').and_then(|(number, _)| number.parse().ok()).unwrap_or(u64::MAX);
        Some((Self { milliseconds, name: name.to_owned() }, queue))
    }

    /// The file's name.
    pub(super) fn as_str(&self) -> &str {
        &self.name
    }
}

/// Names files so that they sort in the order in which they were named.
#[derive(Debug, Default)]
pub(super) struct Namer {
    last: u64,
}

impl Namer {
    /// A name for a new message at the end of a queue. `None`: a file cannot be called so.
    pub(super) fn name(&mut self, queue: &str) -> Option<String> {
        if queue.is_empty() || queue.contains(['/', '\0']) {
            return None;
        }
        let now = clock_gettime(ClockId::Monotonic);
        let milliseconds =
            u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000;
        // Two messages of one millisecond would be ordered by their random parts.
        self.last = milliseconds.max(self.last + 1);
        Some(format!("{}_{}.{queue}.msg", self.last, Uuid::new_v4()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_may_have_dots_and_what_is_no_message_has_no_queue() {
        let queue = |name| FileName::parse(name).map(|(_, queue)| queue);
        assert_eq!(queue("12_ab-cd.a.b.msg"), Some("a.b"));
        assert_eq!(queue("12_ab-cd.a.msg.msg"), Some("a.msg"));
        assert_eq!(queue(".celeriac"), None);
        assert_eq!(queue("12_ab.a.tmp"), None);
    }

    #[test]
    fn names_sort_in_the_order_in_which_they_were_made() {
        let mut namer = Namer::default();
        let made: Vec<String> = (0..2000).map(|_| namer.name("q").unwrap()).collect();
        let mut sorted: Vec<FileName> = made.iter().map(|name| FileName::parse(name).unwrap().0).collect();
        sorted.sort();
        assert_eq!(sorted.iter().map(FileName::as_str).collect::<Vec<_>>(), made);
        let (early, late) =
            (FileName::parse("999_x.q.msg").unwrap().0, FileName::parse("1000_a.q.msg").unwrap().0);
        assert!(early < late);
    }

    #[test]
    fn a_queue_cannot_lead_out_of_the_folder() {
        for queue in ["../q", "a/b", "", "a\0b"] {
            assert_eq!(Namer::default().name(queue), None);
        }
    }
}
