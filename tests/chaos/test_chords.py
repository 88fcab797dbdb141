"""Chords on Redis while children and workers are killed: each body runs exactly once, with what its members gave.

CHORDS=200 CHORD_MEMBERS=500     how many, of how many members (default: small)
CHAOS_SEED=7                     repeats a run; the seed of each run is printed
CELERIAC_CONTINUATIONS=native    bodies sent by the supervisor only (python: by Celery's own code in the child only)

About one blow a chord falls at random. As many are aimed where a body is lost or sent twice if it ever is: at the
process that has just run the last member, while its part is counted and the body is sent.
"""

import json
import os
import random
import signal
import threading
import time

import pytest
from celery import chord
from support.waiting import PATIENCE, until

CHORDS = int(os.environ.get("CHORDS", "10"))
MEMBERS = int(os.environ.get("CHORD_MEMBERS", "40"))
SEED = int(os.environ.get("CHAOS_SEED", str(random.SystemRandom().randrange(2**32))))
CONTINUATIONS = os.environ.get("CELERIAC_CONTINUATIONS", "native python").split()

WORKER_DEATHS = 1 + CHORDS // 40

# Chords on their way at a time: enough for both workers, few enough for the blows to hit most of them.
AT_A_TIME = 4

# Without a new body for so long the missing ones will never run: a dead worker's messages are back in seconds.
LOST_AFTER = 45.0


class Journal:
    """Reads on where it stopped: it grows by a line for each member."""

    def __init__(self, path):
        self.path = path
        self.offset = 0
        self.ran = 0
        self.members = {number: set() for number in range(CHORDS)}
        self.bodies = {number: [] for number in range(CHORDS)}

    def read(self):
        """Pids of those who ran the last member of a chord since it was read before."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.offset += len(new)
        last = []
        for line in map(json.loads, new.splitlines()):
            if line["event"] == "body":
                self.bodies[line["chord"]].append(line)
                continue
            self.ran += 1
            members = self.members[line["chord"]]
            if line["index"] not in members and len(members) == MEMBERS - 1:
                last.append(line["pid"])
            members.add(line["index"])
        return last

    def complete(self):
        return {number for number, runs in self.bodies.items() if runs}


def kill(pid, how):
    """Whether it was still there: children of a dying worker go by themselves."""
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return False
    return True


class Blows:
    """Kills, and notes which runs of a body that excuses: those whose message was not settled at that moment.

    With late acks such a run has to start again, even when all that it lacked was its acknowledgement. Whatever
    else runs a second time was sent a second time.
    """

    def __init__(self, stage):
        self.redis = stage.redis()
        self.killed = {"child": 0, "supervisor": 0}
        self.excused = set()

    def child(self, pid):
        self.strike("child", pid, lambda: [pid])

    def worker(self, worker):
        self.strike("supervisor", worker.pid, lambda: [process.pid for process in worker.processes()])
        worker.wait()

    def strike(self, role, pid, processes):
        """Stopped first, so that what it has not settled can be read."""
        if not kill(pid, signal.SIGSTOP):
            return
        held = (json.loads(entry)[0]["headers"] for entry in self.redis.hvals("unacked"))
        bodies = [headers["id"] for headers in held if headers["task"] == "body"]
        if bodies:
            self.excused |= {(process, body) for process in processes() for body in bodies}
        if kill(pid, signal.SIGKILL):
            self.killed[role] += 1

    def excuse(self, run):
        return (run["pid"], run["id"]) in self.excused


def worker_of(workers, pid):
    """Each worker is a session of its own."""
    try:
        return next((worker for worker in workers if worker.pid == os.getsid(pid)), None)
    except ProcessLookupError:
        return None


@pytest.mark.ours
@pytest.mark.timeout(240 + CHORDS * MEMBERS // 50)
@pytest.mark.parametrize("continuations", CONTINUATIONS)
def test_each_chord_body_runs_once_whoever_is_killed(stage_on, kind, continuations):
    print(f"CHAOS_SEED={SEED} CHORDS={CHORDS} CHORD_MEMBERS={MEMBERS}")
    chance = random.Random(f"{SEED} {continuations}")
    stage = stage_on(kind)
    # Results are asked for one by one at the end; a hundred thousand subscriptions would drown the producer.
    stage.app.backend.on_task_call = lambda *_: None

    def start():
        return stage.worker(app="chords", concurrency=2, env={"CELERIAC_CONTINUATIONS": continuations})

    workers = [start(), start()]
    journal, blows, results = Journal(stage.journal_path), Blows(stage), {}
    room = threading.Semaphore(AT_A_TIME)
    paces = [chance.choice([0, 0, 0.001, 0.01]) for _ in range(CHORDS)]

    def send():
        for number, pace in enumerate(paces):
            room.acquire()
            members = [stage.s("member", number, index, pace) for index in range(MEMBERS)]
            results[number] = chord(members, stage.s("body", number, pace * 5), app=stage.app).apply_async()

    threading.Thread(target=send, name="sender", daemon=True).start()
    deaths_at = sorted(chance.sample(range(1, CHORDS // 2 + 1), WORKER_DEATHS))
    complete, progress, next_blow = set(), time.monotonic(), 1
    while len(complete) < CHORDS and time.monotonic() < progress + LOST_AFTER:
        for pid in journal.read():
            time.sleep(chance.choice([0, chance.uniform(0, 0.02)]))  # the moment of the blow is the point
            if deaths_at and len(complete) >= deaths_at[0]:
                if victim := worker_of(workers, pid):
                    deaths_at.pop(0)
                    blows.worker(victim)
                    workers[workers.index(victim)] = start()
            elif chance.random() < 0.7:
                blows.child(pid)
        if journal.ran >= next_blow:
            next_blow = journal.ran + chance.randrange(1, 2 * MEMBERS)
            # With both children gone the leaf of the tree is the zygote.
            if len(pids := chance.choice(workers).children_running_tasks()) == 2:
                blows.child(chance.choice(sorted(pids)))
        if new := journal.complete() - complete:
            room.release(len(new))
            complete |= new
            progress = time.monotonic()
        time.sleep(0.001)

    def missing():
        lost = {number: len(journal.members[number]) for number in sorted(set(range(CHORDS)) - complete)}
        return f"bodies that never ran, and how many members did: {lost}"

    told = f"killed {blows.killed}, seed {SEED}\n{stage.logs()}"
    assert len(complete) == CHORDS, f"{missing()}; {told}"
    stage.wait_empty()
    for number, result in results.items():
        until(lambda r=result: r.state == "SUCCESS", lambda r=result: f"{r.id}: {r.state}; {told}")
        assert result.result == total_of(number), told
    journal.read()
    runs = [run for number in range(CHORDS) for run in journal.bodies[number]]
    wrong = [run for run in runs if (run["total"], run["count"]) != (total_of(run["chord"]), MEMBERS)]
    assert not wrong, f"bodies that were given something else than their members' values: {wrong}; {told}"
    for number in range(CHORDS):
        own = journal.bodies[number]
        repeated = len(own) - 1
        assert repeated <= sum(blows.excuse(run) for run in own), f"body {number} was sent twice: {own}; {told}"
    for worker in workers:
        assert worker.stop() == 0
    assert blows.killed["supervisor"], "a worker was hit"
    print(f"{CHORDS} chords, killed {blows.killed}, {len(runs) - CHORDS} runs of bodies were repeated")


def total_of(number):
    return sum(number * 1000 + index for index in range(MEMBERS))


@pytest.mark.ours
@pytest.mark.parametrize(
    ("dies", "continuations"),
    [
        *(("dies_with_its_result_stored", rung) for rung in CONTINUATIONS),
        # The supervisor stores the result and counts the part in one: whoever dies before has done neither.
        ("dies_with_its_result_stored_early", "python"),
    ],
)
def test_a_member_that_dies_before_its_part_is_counted_costs_no_body(stage_on, kind, dies, continuations):
    stage = stage_on(kind)
    stage.worker(app="chords", env={"CELERIAC_CONTINUATIONS": continuations})
    result = chord([stage.s("member", 0, 1, 0), stage.s(dies)], stage.s("body", 0, 0), app=stage.app).apply_async()
    assert result.get(timeout=PATIENCE) == 8
    stage.wait_empty()
    assert len(stage.journal("body")) == 1


@pytest.mark.ours
@pytest.mark.parametrize("step", ["before it sends", "after it has sent"])
def test_a_member_that_dies_while_it_sends_the_body_neither_loses_nor_repeats_it(stage_on, kind, step):
    stage = stage_on(kind)
    # The handler of a signal has the body sent by the child.
    stage.worker(app="chords", env={"DIES": step})
    members = [stage.s("member", 0, index, 0) for index in range(3)]
    result = chord(members, stage.s("body", 0, 0), app=stage.app).apply_async()
    assert result.get(timeout=PATIENCE) == 3
    stage.wait_empty(timeout=90)  # what the dead process claimed is its own for 20 seconds
    assert len(stage.journal("body")) == 1
