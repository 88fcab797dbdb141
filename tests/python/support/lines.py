"""Worker logs, made comparable: what differs from run to run is replaced by a word."""

import re

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

HEAD = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: (?P<level>[A-Z]+)/(?P<process>[\w-]+)\] (?P<text>.*)$")

REPLACEMENTS = [
    (re.compile(UUID), "<id>"),
    (re.compile(r"succeeded in [\d.e-]+s"), "succeeded in <time>s"),
    (re.compile(r"(<Unrepresentable <class '[^']+'>: \w+\([^)]*\)).*"), r"\1>"),
    (re.compile(r"Retry at [\d :.+-]+"), "Retry at <time>"),
    (re.compile(r"pid:\d+"), "pid:<pid>"),
    (re.compile(r"ForkPoolWorker-\d+"), "ForkPoolWorker-<n>"),
    (re.compile(r"Job: \d+"), "Job: <n>"),
    (re.compile(r"with id=\d+"), "with id=<id>"),
    (re.compile(r"0x[0-9a-f]+"), "<address>"),
    (re.compile(r"127\.0\.0\.1:\d+"), "<server>"),
    (re.compile(r"\bq\d+\b"), "<queue>"),
]


def plain(text):
    for pattern, word in REPLACEMENTS:
        text = pattern.sub(word, text)
    return text


def lines(log):
    """(level, process, text) of each record; lines that follow a record belong to it and are left out."""
    found = []
    for line in log.splitlines():
        if match := HEAD.match(line):
            found.append((match["level"], plain(match["process"]), plain(match["text"])))
    return found


def lines_of_task(log, task_id):
    """The records that name the task, in order."""
    return lines("\n".join(line for line in log.splitlines() if task_id in line))


def without_weight(found):
    """Without the record that only celeriac has: who killed a child, and what it weighed."""
    return [line for line in found if "bytes resident" not in line[2]]


def by_process(found):
    """The order within a process is kept; between processes there is none."""
    sorted_out = {}
    for level, process, text in found:
        sorted_out.setdefault(process, []).append((level, text))
    return sorted_out
