"""Flower, as its users see and use it: pages in a real browser, buttons that a person would press."""

import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest
from support.browser import Browser
from support.servers import Server
from support.waiting import until
from support.worker import APPS

FLOWER = ["flower==2.2.0", "tornado<7", "prometheus_client", "humanize", "pytz"]

NODE = "watched@here"


@pytest.fixture(scope="module")
def flower_folder(tmp_path_factory):
    """In a folder of its own: its command would be loaded by every other `celery` of the tests."""
    folder = tmp_path_factory.mktemp("flower")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(folder), *FLOWER], capture_output=True, text=True, timeout=300)
    if done.returncode:
        if "No matching distribution" in done.stderr and os.environ.get("CI") != "true":
            pytest.skip(f"the package index cannot be reached: {FLOWER[0]} is not tested")
        pytest.fail(done.stderr)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class Flower(Server):
    """Flower for the app of a stage."""

    def __init__(self, folder, packages, conf):
        super().__init__(folder)
        self.packages = packages
        self.conf = conf

    def environment(self):
        return os.environ | {
            "PYTHONPATH": f"{self.packages}{os.pathsep}{APPS}",
            "APP_CONF": json.dumps(self.conf),
            "FLOWER_UNAUTHENTICATED_API": "true",
        }

    def command(self):
        return [sys.executable, "-m", "celery", "-A", "zoo", "flower", "--address=127.0.0.1",
                f"--port={self.port}", "--inspect-timeout=5000"]  # fmt: skip

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/healthcheck", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


class Pages:
    """What is read off Flower's pages."""

    def __init__(self, browser, flower, kind):
        self.browser = browser
        self.url = flower.url
        self.kind = kind

    def worker(self, tab):
        """The page of the worker, as Flower knows it after asking it anew."""
        with urllib.request.urlopen(f"{self.url}/api/workers?refresh=1&workername={NODE}", timeout=30):
            pass
        self.browser.open(f"{self.url}/worker/{NODE}#tab-{tab}")
        self.browser.until(lambda: self.browser.texts("#workername") == [NODE], "the worker")
        self.browser.screenshot(f"flower-{self.kind}-{tab}")

    def toast(self):
        """What a button answers."""
        toasts = self.browser.until(lambda: self.browser.texts(".toast-body"), "an answer")
        kinds = self.browser.driver.execute_script("return document.querySelector('.toast').className")
        return ["error" if "danger" in kinds else "done", re.sub(r"\s+", " ", toasts[0])]

    def press(self, tab, button, **fields):
        self.worker(tab)
        for field, text in fields.items():
            self.browser.fill("#" + field.replace("_", "-"), text)
        self.browser.click(button)
        return self.toast()

    def limit(self, kind, value):
        """Sets a limit of the task `add`, whose row says which it has already."""
        self.worker("limits")
        button = self.browser.driver.find_element("css selector", f"[id^='task-{kind}-add']")
        self.browser.driver.execute_script("$(arguments[0]).siblings('input').val(arguments[1])", button, value)
        self.browser.driver.execute_script("arguments[0].click()", button)
        return self.toast()

    def task(self, result):
        """The details of a task, by their titles."""
        self.browser.open(f"{self.url}/task/{result.id}")
        names = self.browser.texts(".detail-row dt")
        values = self.browser.texts(".detail-row dd")
        return dict(zip(names, values, strict=True))

    def pool(self):
        self.worker("pool")
        return dict(self.browser.table("#tab-pool"))


@pytest.mark.timeout(600)
def test_flower_shows_and_controls_a_worker(alike, browser, flower_folder):
    def scenario(stage):
        folder = stage.folder / "flower"
        folder.mkdir()
        worker = stage.worker(f"--hostname={NODE}", "-E", concurrency=2, conf={"worker_pool_restarts": True})
        with Flower(folder, flower_folder, stage.conf) as flower:
            return play(stage, worker, Pages(browser, flower, stage.kind))

    seen = alike(scenario)
    assert seen["row"][1:4] == ["Online", "1", "5"]
    assert seen["row"][4:6] == ["1", "3"]
    assert seen["states"] == ["FAILURE", "STARTED", "SUCCESS", "SUCCESS", "SUCCESS"]
    assert seen["failed"]["Exception"].startswith("ValueError")
    assert seen["terminated"] == "REVOKED"
    assert seen["processes"] == [2, 3, 2]
    assert all(answer[0] == "done" for answer in seen["answers"].values()), seen["answers"]
    assert seen["status"] == 0


def play(stage, worker, pages):
    browser = pages.browser
    browser.open(f"{pages.url}/workers")
    browser.until(lambda: [row[:2] for row in browser.table("#workers-table")] == [[NODE, "Online"]], "the worker")
    # Flower turns events on and listens; what came before it listened it cannot know.
    results = [stage.send("add", number, 1) for number in range(3)]
    failed = stage.send("fail", "missing")
    running = stage.send("sleep", 120, "long")
    assert [result.get(timeout=30) for result in results] == [1, 2, 3]
    until(failed.ready, stage.logs)
    stage.wait_journal("started")

    def settled():
        rows = browser.table("#workers-table")
        return rows[0] if rows and rows[0][2:6] == ["1", "5", "1", "3"] else None

    seen = {"row": browser.until(settled, "one active, five processed, one failed, three succeeded")[:6]}
    browser.screenshot(f"flower-{stage.kind}-workers")
    browser.open(f"{pages.url}/tasks")
    rows = browser.until(lambda: len(rows := browser.table("#tasks-table")) == 5 and rows, "five tasks")
    browser.screenshot(f"flower-{stage.kind}-tasks")
    seen["states"] = sorted(row[2] for row in rows)
    seen["names"] = sorted(row[0] for row in rows)
    seen["details"] = sorted(pages.task(results[0]))
    details = pages.task(failed)
    browser.screenshot(f"flower-{stage.kind}-failed")
    seen["failed"] = {name: details[name] for name in ("Name", "Status", "Arguments", "Exception", "Worker")}
    seen["traceback"] = details["Traceback"].strip().splitlines()[-1] if "Traceback" in details else None

    pool = pages.pool()
    seen["pool"] = sorted(pool)
    seen["implementation"] = [value for name, value in pool.items() if "Implementation" in name]
    pages.worker("queues")
    rows = browser.table("#tab-queues")
    seen["queues"] = [["its own" if cell == stage.queue else cell for cell in row[:6]] for row in rows]
    pages.worker("tasks")
    seen["active"] = [row[0] for row in browser.table("#tab-tasks table:nth-of-type(2)")]
    pages.worker("limits")
    seen["limits"] = [row[0] for row in browser.table("#tab-limits")]
    pages.worker("config")
    seen["settings"] = sorted(row[0] for row in browser.table("#tab-config"))
    pages.worker("broker")
    seen["broker"] = sorted(row[0] for row in browser.table("#tab-broker"))
    pages.worker("system")
    seen["system"] = sorted(row[0] for row in browser.table("#tab-system"))

    def processes():
        found = next(value for name, value in pages.pool().items() if name == "Processes")
        return len(re.findall(r"\d+", found))

    answers = seen["answers"] = {}
    seen["processes"] = [processes()]
    answers["grow"] = pages.press("pool", "#worker-pool-grow", pool_size=1)
    until(lambda: processes() == 3, worker.describe)
    seen["processes"].append(processes())
    answers["shrink"] = pages.press("pool", "#worker-pool-shrink", pool_size=1)
    until(lambda: processes() == 2, worker.describe)
    seen["processes"].append(processes())
    answers["add"] = pages.press("queues", "#worker-add-consumer", add_consumer_name="extra")
    assert stage.send("add", 20, 2, queue="extra").get(timeout=30) == 22
    answers["cancel"] = pages.press("queues", "#worker-cancel-consumer-extra")
    answers["rate"] = pages.limit("rate-limit", 7)
    pages.worker("limits")
    seen["limited"] = [row[0] for row in browser.table("#tab-limits") if row[0].startswith("add ")]
    answers["hard"] = pages.limit("timeout-hard", 70)

    pages.task(running)
    browser.click("#task-terminate")
    answers["terminate"] = [*pages.toast()]
    answers["terminate"][1] = answers["terminate"][1].replace(running.id, "ID")
    browser.until(lambda: pages.task(running)["Status"] == "REVOKED", "the end of the task")
    seen["terminated"] = pages.task(running)["Status"]
    answers["restart"] = pages.press("pool", "#worker-pool-restart")
    assert stage.send("add", 2, 2).get(timeout=30) == 4
    answers["shutdown"] = pages.press("pool", "#worker-shutdown")
    seen["status"] = worker.wait()
    return seen
