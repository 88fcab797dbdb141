//! Tables of exchanges: `<control folder>/<exchange>.exchange`, a JSON list of `[routing key, pattern, queue]`, locked
//! with flock while it is read or changed. Python producers and workers read and write the same files.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use regex::Regex;
use rustix::fs::{FlockOperation, flock};

/// One binding: routing key, pattern (of topic exchanges), queue.
pub(super) type Entry = (String, String, String);

/// The pattern that kombu stores for a topic binding.
pub(super) fn pattern(key: &str) -> String {
    let words = key.split('.').map(|word| match word {
        "*" => r"[^\.]+".to_owned(),
        "#" => ".*?".to_owned(),
        word => escape(word),
    });
    format!("^{}$", words.collect::<Vec<_>>().join(r"\."))
}

fn escape(word: &str) -> String {
    let mut escaped = String::new();
    for character in word.chars() {
        match character {
            '\0' => escaped.push_str("\\000"),
            '#' | '*' => escaped.push(character),
            character if character.is_alphanumeric() => escaped.push(character),
            character => escaped.extend(['\\', character]),
        }
    }
    escaped
}

/// The queues that a message to an exchange of this kind reaches, each once.
pub(super) fn route(table: &[Entry], kind: &str, key: &str) -> Vec<String> {
    let mut queues = Vec::new();
    for (bound, pattern, queue) in table {
        let matches = match kind {
            "fanout" => true,
            // Only what kombu or we have written is expected here; what does not compile matches nothing.
            "topic" => Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(key)),
            _ => bound == key,
        };
        if matches && !queue.is_empty() && !queues.contains(queue) {
            queues.push(queue.clone());
        }
    }
    queues
}

/// The folder of the tables.
#[derive(Clone, Debug)]
pub(super) struct Tables(pub(super) PathBuf);

impl Tables {
    /// Names that kombu accepts; anything else could lead out of the folder.
    fn file(&self, exchange: &str) -> io::Result<PathBuf> {
        let harmless = exchange.chars().all(|it| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-'));
        if !harmless || (!exchange.is_empty() && exchange.chars().all(|it| it == '.')) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("invalid exchange name {exchange:?}"),
            ));
        }
        Ok(self.0.join(format!("{exchange}.exchange")))
    }

    /// The bindings of an exchange; none when nobody has bound to it.
    pub(super) fn read(&self, exchange: &str) -> io::Result<Vec<Entry>> {
        match File::open(self.file(exchange)?) {
            Ok(mut file) => {
                flock(&file, FlockOperation::LockShared)?;
                parse(&mut file, &self.file(exchange)?)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Adds a binding.
    pub(super) fn bind(&self, exchange: &str, entry: Entry) -> io::Result<()> {
        self.change(exchange, |table| {
            let missing = !table.contains(&entry);
            if missing {
                table.insert(0, entry);
            }
            missing
        })
    }

    /// Removes a queue from an exchange.
    pub(super) fn unbind(&self, exchange: &str, queue: &str) -> io::Result<()> {
        self.change(exchange, |table| {
            let before = table.len();
            table.retain(|(_, _, bound)| bound != queue);
            table.len() != before
        })
    }

    fn change(&self, exchange: &str, change: impl FnOnce(&mut Vec<Entry>) -> bool) -> io::Result<()> {
        let path = self.file(exchange)?;
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        // Held until the file is closed.
        flock(&file, FlockOperation::LockExclusive)?;
        let mut table = parse(&mut file, &path)?;
        if change(&mut table) {
            let text = serde_json::to_vec(&table)?;
            file.rewind()?;
            file.write_all(&text)?;
            file.set_len(text.len() as u64)?;
        }
        Ok(())
    }
}

fn parse(file: &mut File, path: &Path) -> io::Result<Vec<Entry>> {
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&text).map_err(|error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is no exchange table: {error}", path.display()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_that_kombu_stores() {
        assert_eq!(pattern("a.*.#.b-c@d"), r"^a\.[^\.]+\..*?\.b\-c\@d$");
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        let tables = Tables(PathBuf::from("/nowhere"));
        for name in ["../x", "a/b", "..", "a b", "ä"] {
            assert_eq!(tables.file(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
        assert!(tables.file("celery.pidbox").is_ok());
    }
}
