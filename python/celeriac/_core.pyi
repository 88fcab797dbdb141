"""What the extension module offers to the Python half."""

from typing import Any

__version__: str
CHORD_SCRIPT: str

#: job, task, id, headers, properties, exchange, routing key, redelivered, hints, body, content type, content encoding,
#: acks early
Job = tuple[int, str, str, str, str, str, str, bool, int, bytes, str, str, bool]

def remember(value: Any, error: BaseException | None = None) -> None: ...
def replay(*args: Any, **kwargs: Any) -> Any: ...

class ChildPipe:
    """A child's end of the frames."""

    pid: int
    def __new__(cls, fd: int, *, looped: bool = False, hub: Any = None) -> ChildPipe: ...
    def up(self) -> None: ...
    def recv(
        self,
    ) -> Job | tuple[int, bytes] | int | None: ...
    def fileno(self) -> int: ...
    def collect(
        self,
    ) -> (
        tuple[
            list[Job],
            list[tuple[int, str | None]],
            list[tuple[int, tuple[int, int | None, int | None, bool]]],
            list[tuple[int, bool]],
            int | None,
        ]
        | None
    ): ...
    def flush_kept(self) -> None: ...
    def take(
        self,
    ) -> tuple[list[tuple[Any, ...]], list[int], list[tuple[int, float | None]], int | None, bool]: ...
    def flush(self) -> bool: ...
    def terminated(self, job: int) -> None: ...
    def timed_out(self, job: int, limit: float) -> None: ...
    def accepted(self, job: int) -> None: ...
    def succeeded(self, job: int, result: str, runtime: float) -> None: ...
    def failed(self, job: int, exception: str, traceback: str, runtime: float) -> None: ...
    def retried(self, job: int, exception: str, traceback: str) -> None: ...
    def ignored(self, job: int) -> None: ...
    def rejected(self, job: int, requeue: bool, exception: str, traceback: str) -> None: ...
    def answered(self, job: int, value: bytes, *, lost: str | None = None) -> None: ...
    def undecodable(self, job: int, reason: str) -> None: ...
    def malformed(self, job: int, reason: str | None) -> None: ...
    def translated(self, job: int, headers: str, body: bytes, content_type: str, content_encoding: str) -> None: ...
    def lost(self, job: int, status: str) -> None: ...
    def store(
        self,
        job: int,
        task_id: str,
        state: str,
        document: bytes,
        key: str,
        expires: float | None,
        content_type: str,
        content_encoding: str,
        *,
        wait: bool,
    ) -> Any: ...
    def go_on(
        self,
        job: int,
        target: Target,
        task_id: str,
        reply_to: str,
        args: str,
        kwargs: str,
        options: str,
        *,
        as_tuple: bool,
        hold: bool,
        wait: bool,
    ) -> Any: ...
    def count(self, job: int, keys: list[bytes], arguments: list[bytes]) -> Any: ...

class Target:
    """Where the messages of a task go and what they are like."""

    def __new__(cls, json: str) -> Target: ...
    def message(
        self, task_id: str, reply_to: str, args: str, kwargs: str, options: str, *, as_tuple: bool
    ) -> tuple[str, str, str]: ...

class Desk:
    """What the app's own objects in the main process ask of the worker; see `celeriac.hosting`."""

    def settle(self, ticket: int, how: str) -> None: ...
    def call(
        self,
        number: int,
        body: bytes,
        *,
        ticket: int | None,
        soft_limit: float | None,
        hard_limit: float | None,
    ) -> None: ...
    def elect(self, id: str, topic: str, action: str) -> None: ...
    def event(self, kind: str, fields: str) -> None: ...
    def terminate(self, number: int, signal: int) -> None: ...
    def ask(self, method: str, arguments: str) -> str: ...
    def prefetch(self, messages: int) -> None: ...
    def tasks(self, policies: str) -> None: ...
    def restart(self, reload: str) -> None: ...
    def consume(self, queue: str) -> None: ...
    def cancel(self, queue: str) -> None: ...
    def stop(self, code: int) -> None: ...

class KombuPort:
    """What kombu's thread has of a broker session; see `celeriac.kombu_bridge`."""

    def fileno(self) -> int: ...
    def take(self) -> list[tuple[str, Any]]: ...
    def started(self) -> None: ...
    def lost(self, reason: str, retryable: bool) -> None: ...
    def deliver(
        self,
        messages: list[tuple[int, str, tuple[bytes, str, str, str | None, str | None, str, str, bool]]],
    ) -> bool: ...
    def control(self, message: tuple[bytes, str, str, str | None, str | None, str, str, bool]) -> bool: ...
    def answer(self, number: int, error: str | None) -> None: ...

def parse_globals(argv: list[str], env: dict[str, str], version: str) -> str:
    """The global options and the command, as JSON."""

def parse_command(name: str, arguments: list[str], env: dict[str, str], user: str) -> str:
    """The options of one of our commands, as JSON."""

def refuse_options(options: str) -> str | None:
    """Why worker options (a JSON object) cannot be served."""

def own_options() -> str:
    """The worker's options that Celery does not have, as JSON."""

def control_commands() -> str:
    """Every command of remote control that is not the app's, as JSON: name, alias, kind, arguments."""

def options_reference() -> str:
    """All options, in Markdown."""

def foreign_broker(config: str) -> str | None:
    """The scheme of the first broker address that is not spoken natively."""

def knows_backend(config: str, broker: str) -> bool:
    """Whether results can be written natively to this backend."""

def run_worker(
    config: str,
    hooks: Any,
    *,
    zygote_fd: int,
    zygote_pid: int,
    wants_received: bool,
    bridges: list[Any] | None = None,
    desk: Desk | None = None,
) -> tuple[int, bool, str | None]:
    """Runs the worker until it ends: exit status, restart, what broke it."""
