"""Starts a worker on two folders, lets a Celery producer in another process call it, stops it.

    python demo/run.py                              # celeriac
    python demo/run.py --worker celery              # the original, for comparison

Exit status 0 only if every answer was right and the worker stopped cleanly.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATIENCE = 60  # seconds for the worker to start, the producer to finish, the worker to stop


def start_worker(command, env, log):
    worker = subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ready = threading.Event()

    def follow():
        for line in worker.stdout:
            log.append(line)
            if line.rstrip().endswith(" ready."):
                ready.set()
        ready.set()  # it ended: nothing to wait for any more

    threading.Thread(target=follow, daemon=True).start()
    ready.wait(PATIENCE)
    if worker.poll() is not None or not any(" ready." in line for line in log):
        worker.kill()
        sys.exit("The worker did not become ready:\n" + "".join(log))
    return worker


def stop_worker(worker):
    worker.send_signal(signal.SIGTERM)
    try:
        return worker.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        worker.kill()
        return "killed: it did not stop by itself"


def run(worker_name):
    log = []
    with tempfile.TemporaryDirectory(prefix="celeriac-demo-") as folder:
        bin_dir = sysconfig.get_path("scripts")
        env = os.environ | {
            "DEMO_FOLDER": folder,
            "PYTHONPATH": str(HERE),
            "PATH": bin_dir + os.pathsep + os.environ.get("PATH", ""),
        }
        options = ["--loglevel", "INFO", "--concurrency", "2", "--hostname", "demo@%h"]
        command = [*shlex.split(worker_name), "-A", "proj", "worker", *options]
        print(f"$ {shlex.join(command)}", flush=True)
        worker = start_worker(command, env, log)
        print(f"$ python producer.py{'':<24} (in another process: Celery's own client)", flush=True)
        try:
            producer = subprocess.run([sys.executable, "producer.py"], cwd=HERE, env=env, timeout=PATIENCE * 2)
            answered = producer.returncode
        except subprocess.TimeoutExpired:
            answered = "timed out"
        print("$ kill -TERM the worker", flush=True)
        stopped = stop_worker(worker)
        left = list(Path(folder, "queue").glob("*.msg"))
    print(f"  it ended with status {stopped}; messages left in the queue: {len(left)}")
    if answered == 0 and stopped == 0 and not left:
        print("All answers were right.")
        return 0
    print(f"\nSomething is wrong (producer: {answered}, worker: {stopped}). What the worker logged:\n" + "".join(log))
    return 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worker",
        default="celeriac",
        help="the command that takes the place of `celery` (default: %(default)s)",
    )
    return run(parser.parse_args().worker)


if __name__ == "__main__":
    sys.exit(main())
