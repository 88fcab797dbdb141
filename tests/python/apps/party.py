"""An app that notes who comes and goes."""

from base import make_app, record
from celery import bootsteps

app = make_app("party")


@app.task(name="note")
def note(number):
    record("ran", number=number)


class Doorman(bootsteps.StartStopStep):
    requires = {"celery.worker.consumer.gossip:Gossip"}

    def start(self, consumer):
        consumer.gossip.on.node_join.add(lambda worker: record("node_join", node=worker.hostname))
        consumer.gossip.on.node_leave.add(lambda worker: record("node_leave", node=worker.hostname))


app.steps["consumer"].add(Doorman)
