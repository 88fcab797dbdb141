//! How much memory a process has, as the kernel counts it, and whether the kernel has killed one for it.

use std::fs;
use std::path::{Path, PathBuf};

use super::wear::Weight;

/// What a process has resident: quick, and never less than what it has for itself. None: it is gone.
pub(super) fn resident(pid: u32) -> Option<Weight> {
    let (resident, _) = statm(pid)?;
    Some(Weight::AtMost(resident))
}

/// What a process has for itself alone: pages that it shares with the process it was forked from do not count. Walks
/// its page tables, which takes a while for a large one.
pub(super) fn private(pid: u32) -> Option<Weight> {
    match fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) {
        Ok(text) => Some(Weight::Private(sum_of_private(&text))),
        // After a change of user the kernel shows it to root only: anonymous memory, shared or not, is next best.
        Err(_) => statm(pid).map(|(resident, shared)| Weight::Private(resident.saturating_sub(shared))),
    }
}

fn sum_of_private(rollup: &str) -> u64 {
    rollup.lines().filter(|line| line.starts_with("Private_")).filter_map(kib).sum()
}

/// The number in `Private_Dirty:   112 kB`.
fn kib(line: &str) -> Option<u64> {
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Resident and shared KiB.
fn statm(pid: u32) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let page = rustix::param::page_size() as u64 / 1024;
    let mut fields = text.split_ascii_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok());
    Some((fields.next()? * page, fields.next()? * page))
}

/// The kernel's count of processes that it has killed for lack of memory.
#[derive(Debug)]
pub(super) struct Killings {
    /// The file that counts those of our own group, and what the limit of the group is.
    group: Option<(PathBuf, Option<u64>)>,
    /// How many are accounted for.
    known: u64,
}

impl Killings {
    /// Counts from now on.
    pub(super) fn here() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::of(&own, Path::new("/sys/fs/cgroup"))
    }

    fn of(own: &str, root: &Path) -> Self {
        let group = group(own, root);
        let mut killings = Self { group, known: 0 };
        killings.known = killings.count().unwrap_or(0);
        killings
    }

    /// Whether there was one more than was known, which is known now. None: the kernel does not tell.
    pub(super) fn another(&mut self) -> Option<bool> {
        let count = self.count()?;
        let more = count > self.known;
        if more {
            self.known += 1;
        }
        Some(more)
    }

    /// Most bytes that the group may have.
    pub(super) fn limit(&self) -> Option<u64> {
        self.group.as_ref()?.1
    }

    fn count(&self) -> Option<u64> {
        let (file, _) = self.group.as_ref()?;
        let text = fs::read_to_string(file).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    }
}

/// The group that accounts for the memory of this process, by `/proc/self/cgroup`: the file with its count, and its
/// limit. In a container the path may be that of the host; the group is then at the root.
fn group(own: &str, root: &Path) -> Option<(PathBuf, Option<u64>)> {
    /// (where it is mounted, the file with the count, the file with the limit)
    const V1: (&str, &str, &str) = ("memory", "memory.oom_control", "memory.limit_in_bytes");
    const V2: [(&str, &str, &str); 2] =
        [("", "memory.events", "memory.max"), ("unified", "memory.events", "memory.max")];
    own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let kinds = match (hierarchy, controllers) {
            ("0", "") => V2.to_vec(),
            (_, controllers) if controllers.split(',').any(|one| one == "memory") => vec![V1],
            _ => return None,
        };
        kinds.into_iter().find_map(|(mount, count, limit)| {
            let mount = root.join(mount);
            let folders = [mount.join(path.trim_start_matches('/')), mount];
            let folder = folders.into_iter().find(|folder| folder.join(count).is_file())?;
            let limit = fs::read_to_string(folder.join(limit)).ok().and_then(|text| text.trim().parse().ok());
            // How the first version says that there is none.
            let limit = limit.filter(|limit| *limit < 1 << 60);
            Some((folder.join(count), limit))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_no_more_for_itself_than_is_resident() {
        let pid = std::process::id();
        let filled = vec![1u8; 32 << 20];
        let (resident, private) = (resident(pid).unwrap().kib(), private(pid).unwrap());
        assert!(matches!(private, Weight::Private(kib) if kib >= 32 << 10), "{private:?}");
        assert!(resident + 1024 >= private.kib(), "{resident} {private:?}");
        drop(filled);
        assert_eq!(super::resident(u32::MAX), None);
    }

    #[test]
    fn private_memory_is_the_sum_of_its_parts() {
        let rollup = "a-b ---p 0 00:00 0 [rollup]\nRss: 1620 kB\nPrivate_Clean: 40 kB\nPrivate_Dirty: 112 kB\n\
                      Shared_Clean: 99 kB\nPrivate_Hugetlb: 2048 kB\n";
        assert_eq!(sum_of_private(rollup), 2200);
    }

    #[test]
    fn killings_are_counted_one_by_one_in_every_layout_of_groups() {
        let folder = std::env::temp_dir().join(format!("celeriac-{}", uuid::Uuid::new_v4()));
        for (own, place, count, limit) in [
            ("0::/pod/one\n", "pod/one", "memory.events", "memory.max"),
            ("0::/host/path/that/is/not/here\n", "", "memory.events", "memory.max"),
            (
                "1:cpu:/\n4:hugetlb,memory:/a\n0::/\n",
                "memory/a",
                "memory.oom_control",
                "memory.limit_in_bytes",
            ),
            ("1:cpu:/\n0::/\n", "unified", "memory.events", "memory.max"),
        ] {
            let root = folder.join(uuid::Uuid::new_v4().to_string());
            let place = root.join(place);
            fs::create_dir_all(&place).unwrap();
            let says = |number: u32| {
                fs::write(place.join(count), format!("oom 9\noom_kill {number}\noom_group_kill 0\n"))
                    .unwrap();
            };
            fs::write(place.join(limit), "4096\n").unwrap();
            says(3);
            let mut killings = Killings::of(own, &root);
            assert_eq!(killings.limit(), Some(4096), "{own}");
            assert_eq!(killings.another(), Some(false), "{own}");
            says(5);
            assert_eq!(
                [killings.another(), killings.another(), killings.another()],
                [Some(true), Some(true), Some(false)]
            );
        }
        assert_eq!(Killings::of("", &folder).another(), None);
        fs::remove_dir_all(folder).unwrap();
    }
}
