//! What a worker hears of the others: who is there, who is missed, and elections. Decides, does nothing.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

/// Seconds between heartbeats of a node that does not say.
const FREQ: f64 = 60.0;
/// Seconds between two looks for nodes that have fallen silent.
pub const LOOK_EVERY: f64 = 5.0;
/// Elections that may be open; one that never gets its votes is forgotten when others come.
const MOST_ELECTIONS: usize = 1000;

/// What follows from an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The clock is to catch up with this.
    Adjust(u64),
    /// The clock goes on: an event of our own came back.
    Forward,
    /// A node is there, with its event.
    Joined(Value),
    /// A node has left, with its event.
    Left(Value),
    /// A vote for this election is to be sent.
    Vote(String),
    /// This node is to do what was voted about.
    Won(Ballot),
    /// Another node is.
    Elected {
        /// Which election.
        id: String,
        /// `hostname.pid` of the winner.
        leader: String,
    },
    /// The event makes no sense: the reason.
    Odd(String),
}

/// What an election is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Ballot {
    /// Names the election.
    pub id: String,
    /// What kind of thing is to be done.
    pub topic: String,
    /// What is to be done.
    pub action: Value,
    /// The candidate's clock.
    clock: u64,
    /// `hostname.pid` of the candidate.
    candidate: String,
}

#[derive(Debug)]
struct Node {
    /// The last event, as it came.
    last: Value,
    heard: f64,
    freq: f64,
}

/// The neighbours, and elections among them.
#[derive(Debug)]
pub struct Gossip {
    hostname: String,
    full_name: String,
    nodes: BTreeMap<String, Node>,
    ballots: HashMap<String, Vec<Ballot>>,
    /// Who has voted in the elections that this node takes part in.
    votes: HashMap<String, HashSet<String>>,
}

impl Gossip {
    /// A worker that has heard of nobody yet.
    pub fn new(hostname: &str, pid: u32) -> Self {
        Self {
            hostname: hostname.to_owned(),
            full_name: format!("{hostname}.{pid}"),
            nodes: BTreeMap::new(),
            ballots: HashMap::new(),
            votes: HashMap::new(),
        }
    }

    /// Names of the nodes that are there.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// This node takes part in an election: its votes are counted.
    pub fn stand(&mut self, id: &str) {
        if self.votes.len() >= MOST_ELECTIONS {
            self.votes.clear();
        }
        self.votes.entry(id.to_owned()).or_default();
    }

    /// An event of the group `worker`, heard at `now` (seconds of any steady clock).
    pub fn hear(&mut self, event: &Value, now: f64) -> Vec<Step> {
        let text = |name: &str| event.get(name).and_then(Value::as_str);
        let (Some(kind), Some(hostname)) = (text("type"), text("hostname")) else {
            return vec![Step::Odd("an event without type or hostname".to_owned())];
        };
        match kind {
            "worker-elect" => self.on_elect(event, hostname),
            "worker-elect-ack" => match text("id") {
                Some(id) => self.on_vote(id, hostname, now),
                None => vec![Step::Odd("a vote for no election".to_owned())],
            },
            _ if hostname == self.hostname => vec![Step::Forward],
            _ => self.on_news(event, kind, hostname, now),
        }
    }

    fn on_news(&mut self, event: &Value, kind: &str, hostname: &str, now: f64) -> Vec<Step> {
        let mut steps: Vec<Step> =
            event.get("clock").and_then(Value::as_u64).map(Step::Adjust).into_iter().collect();
        if kind == "worker-offline" {
            self.nodes.remove(hostname);
            steps.push(Step::Left(event.clone()));
            return steps;
        }
        let freq = event.get("freq").and_then(Value::as_f64).filter(|freq| *freq > 0.0);
        let known = self.nodes.get(hostname);
        let freq = freq.or(known.map(|node| node.freq)).unwrap_or(FREQ);
        if known.is_none() || kind == "worker-online" {
            steps.push(Step::Joined(event.clone()));
        }
        self.nodes.insert(hostname.to_owned(), Node { last: event.clone(), heard: now, freq });
        steps
    }

    fn on_elect(&mut self, event: &Value, hostname: &str) -> Vec<Step> {
        let text = |name: &str| event.get(name).and_then(Value::as_str);
        let number = |name: &str| event.get(name).and_then(Value::as_u64);
        let (Some(id), Some(clock), Some(pid), Some(topic), Some(action)) =
            (text("id"), number("clock"), number("pid"), text("topic"), event.get("action"))
        else {
            return vec![Step::Odd("election request missing a field".to_owned())];
        };
        if self.ballots.len() >= MOST_ELECTIONS && !self.ballots.contains_key(id) {
            self.ballots.clear();
        }
        self.ballots.entry(id.to_owned()).or_default().push(Ballot {
            id: id.to_owned(),
            topic: topic.to_owned(),
            action: action.clone(),
            clock,
            candidate: format!("{hostname}.{pid}"),
        });
        vec![Step::Vote(id.to_owned())]
    }

    /// It is over when all that are alive have voted: who stands says so before it votes. Celery counts votes, of
    /// whomever, so that two may win.
    fn on_vote(&mut self, id: &str, hostname: &str, now: f64) -> Vec<Step> {
        let Some(votes) = self.votes.get_mut(id) else { return Vec::new() };
        votes.insert(hostname.to_owned());
        let mut alive = self.nodes.iter().filter(|(_, node)| node.is_alive(now)).map(|(name, _)| name);
        if !votes.contains(&self.hostname) || !alive.all(|name| votes.contains(name)) {
            return Vec::new();
        }
        self.votes.remove(id);
        let ballots = self.ballots.remove(id).unwrap_or_default();
        // The oldest request wins; of equal ones that of the first name.
        let winner = ballots.into_iter().min_by(|a, b| (a.clock, &a.candidate).cmp(&(b.clock, &b.candidate)));
        match winner {
            None => Vec::new(),
            Some(ballot) if ballot.candidate == self.full_name => vec![Step::Won(ballot)],
            Some(ballot) => vec![Step::Elected { id: ballot.id, leader: ballot.candidate }],
        }
    }

    /// Nodes that have been silent for two heartbeats, with their last event; they are forgotten.
    pub fn missed(&mut self, now: f64) -> Vec<Value> {
        let silent: Vec<String> =
            self.nodes.iter().filter(|(_, node)| !node.is_alive(now)).map(|(name, _)| name.clone()).collect();
        silent.iter().filter_map(|name| self.nodes.remove(name)).map(|node| node.last).collect()
    }
}

impl Node {
    fn is_alive(&self, now: f64) -> bool {
        now < self.heard + 2.0 * self.freq
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(kind: &str, hostname: &str, clock: u64, more: Value) -> Value {
        let mut event = json!({"type": kind, "hostname": hostname, "pid": 1, "clock": clock});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        event
    }

    #[test]
    fn nodes_join_once_leave_and_are_missed_after_two_heartbeats() {
        let mut gossip = Gossip::new("a@here", 1);
        let beat = event("worker-heartbeat", "b@here", 7, json!({"freq": 2.0}));
        assert_eq!(gossip.hear(&beat, 0.0), [Step::Adjust(7), Step::Joined(beat.clone())]);
        assert_eq!(gossip.hear(&beat, 1.0), [Step::Adjust(7)]);
        let online = event("worker-online", "b@here", 8, json!({"freq": 2.0}));
        assert_eq!(gossip.hear(&online, 2.0), [Step::Adjust(8), Step::Joined(online.clone())]);
        assert!(gossip.missed(5.9).is_empty());
        assert_eq!(gossip.missed(6.0), [online]);
        assert_eq!(gossip.nodes().count(), 0);
        gossip.hear(&beat, 7.0);
        let offline = event("worker-offline", "b@here", 9, json!({}));
        assert_eq!(gossip.hear(&offline, 8.0), [Step::Adjust(9), Step::Left(offline)]);
        assert!(gossip.missed(100.0).is_empty());
    }

    #[test]
    fn events_of_our_own_only_move_the_clock() {
        let mut gossip = Gossip::new("a@here", 1);
        assert_eq!(gossip.hear(&event("worker-heartbeat", "a@here", 7, json!({})), 0.0), [Step::Forward]);
        assert_eq!(gossip.nodes().count(), 0);
    }

    #[test]
    fn the_oldest_request_wins_once_all_that_are_alive_have_voted() {
        let elect = |host: &str, clock: u64| {
            event(
                "worker-elect",
                host,
                clock,
                json!({"id": "e", "topic": "task", "action": {"task": "t"}, "cver": 1}),
            )
        };
        let vote = |host: &str| event("worker-elect-ack", host, 9, json!({"id": "e"}));
        let run = |name: &str, clocks: (u64, u64)| {
            let mut gossip = Gossip::new(name, 1);
            let other = if name == "a@here" { "b@here" } else { "a@here" };
            gossip.hear(&event("worker-heartbeat", other, 1, json!({"freq": 2.0})), 0.0);
            gossip.hear(&event("worker-heartbeat", "c@here", 1, json!({"freq": 2.0})), 0.0);
            gossip.stand("e");
            assert_eq!(gossip.hear(&elect("a@here", clocks.0), 0.0), [Step::Vote("e".into())]);
            assert_eq!(gossip.hear(&elect("b@here", clocks.1), 0.0), [Step::Vote("e".into())]);
            for voter in ["a@here", "b@here", "a@here"] {
                assert!(gossip.hear(&vote(voter), 0.0).is_empty());
            }
            gossip.hear(&vote("c@here"), 0.0)
        };
        let elected = |leader: &str| vec![Step::Elected { id: "e".into(), leader: leader.into() }];
        assert!(matches!(run("a@here", (4, 5)).as_slice(), [Step::Won(ballot)] if ballot.topic == "task"));
        assert_eq!(run("a@here", (5, 4)), elected("b@here.1"));
        assert_eq!(run("b@here", (4, 4)), elected("a@here.1"));
    }

    #[test]
    fn a_vote_for_an_election_that_we_know_nothing_of_is_nobodys_business() {
        let mut gossip = Gossip::new("a@here", 1);
        let vote = event("worker-elect-ack", "b@here", 9, json!({"id": "e"}));
        assert!(gossip.hear(&vote, 0.0).is_empty());
    }

    #[test]
    fn nonsense_is_odd_and_never_a_panic() {
        let mut gossip = Gossip::new("a@here", 1);
        for odd in [
            json!(null),
            json!([1]),
            json!({"type": "worker-online"}),
            json!({"type": 3, "hostname": "x"}),
            event("worker-elect", "b@here", 1, json!({"id": "e"})),
            event("worker-elect-ack", "b@here", 1, json!({"id": 4})),
        ] {
            assert!(matches!(gossip.hear(&odd, 0.0).as_slice(), [Step::Odd(_)]), "{odd}");
        }
    }
}
