"""A control group whose memory is limited, where this machine lets us make one."""

import contextlib
from pathlib import Path

import pytest

from support.waiting import until

ROOT = Path("/sys/fs/cgroup")


def own(hierarchy):
    """Path of this process in a hierarchy; in a container it may be that of the host."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if (hierarchy == "unified" and number == "0") or hierarchy in controllers.split(","):
            return path.lstrip("/")
    return ""


def candidates():
    """Folder in which to make a group, and the files that limit its memory and its swap."""
    yield ROOT / "memory" / own("memory"), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    yield ROOT / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    yield ROOT / own("unified"), "memory.max", "memory.swap.max"
    yield ROOT, "memory.max", "memory.swap.max"


def make(name, limit):
    """A new group, or None."""
    for folder, file, swap in candidates():
        group = folder / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(limit))
        except OSError:
            group.rmdir()
            continue
        with contextlib.suppress(OSError):  # of a kernel that does not account for swap
            (group / swap).write_text(str(limit if "memsw" in swap else 0))
        return group
    return None


@contextlib.contextmanager
def limited(name, limit):
    """The words that put a command into a new group of so many bytes."""
    group = make(name, limit)
    if group is None:
        pytest.skip("no control group with limited memory can be made here")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        until(lambda: remove(group), lambda: f"{group} is empty", 10)


def remove(group):
    with contextlib.suppress(OSError):  # of a process that is about to leave
        group.rmdir()
    return not group.exists()
