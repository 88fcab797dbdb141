"""Remote control of the one worker of a stage."""

from support.waiting import until


def replies(stage, command, timeout=10, **arguments):
    [*found] = stage.app.control.broadcast(command, arguments=arguments, reply=True, timeout=timeout, limit=1)
    return [answer for reply in found for answer in reply.values()]


def answer(stage, command, **arguments):
    """The answer of the one worker."""
    [found] = replies(stage, command, **arguments)
    return found


def start(stage, *options, **more):
    """A worker that listens to remote control: the original says that it is ready a little before it does."""
    worker = stage.worker(*options, **more)
    listens(stage)
    return worker


def listens(stage):
    until(lambda: replies(stage, "ping", timeout=1), stage.logs)
