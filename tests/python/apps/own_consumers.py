"""Boot steps that consume messages of their own, beside steps that tell when they are called."""

import os

from base import make_app, record
from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker.control import control_command
from kombu import Consumer, Exchange, Queue

app = make_app("own_consumers")

ORDERS = Queue("orders", Exchange("orders"), routing_key="orders")
INVOICES = Queue("invoices", Exchange("invoices"), routing_key="invoices")


@app.task(name="add")
def add(x, y):
    return x + y


@control_command(args=[("queue", str)])
def feed(state, queue):
    state.consumer.add_task_queue(queue)
    return {"ok": queue}


@control_command(args=[("queue", str)])
def starve(state, queue):
    state.consumer.cancel_task_queue(queue)
    return {"ok": queue}


@control_command()
def leave(state):
    raise WorkerShutdown(6)


class Teller(bootsteps.StartStopStep):
    """Tells of each of its methods that is called."""

    def tell(self, method, **fields):
        record("step", step=type(self).__name__, method=method, **fields)

    def start(self, c):
        self.tell("start")
        if os.environ.get("BROKEN_STEP") == type(self).__name__:
            raise RuntimeError("broken")

    def stop(self, c):
        self.tell("stop")

    def close(self, c):
        self.tell("close")

    def terminate(self, c):
        self.tell("terminate")

    def shutdown(self, c):
        self.tell("shutdown")

    def info(self, c):
        return {type(self).__name__.lower(): "here"}


class OfWorker(Teller):
    requires = ("celery.worker.components:Pool",)


class Unwanted(Teller):
    def include_if(self, c):
        return False


class First(Teller):
    requires = ("celery.worker.consumer:Connection",)


class Orders(bootsteps.ConsumerStep):
    requires = (First,)

    def get_consumers(self, channel):
        record("consumers", queue="orders")
        return [Consumer(channel, queues=[ORDERS], callbacks=[self.on_order], accept=["json"])]

    def on_order(self, body, message):
        if body == "leave":
            message.ack()
            raise WorkerShutdown(7)
        if body == "break":
            message.ack()
            raise RuntimeError("an order")
        if body == "keep":
            record("kept")
            return
        record("order", body=body, redelivered=bool(message.delivery_info.get("redelivered")))
        message.ack()


class Second(Teller):
    requires = (Orders,)


class Invoices(bootsteps.ConsumerStep):
    requires = (Second,)

    def start(self, c):
        record("step", step="Invoices", method="start", connected=c.connection.connected, pool=c.pool.num_processes)
        super().start(c)

    def get_consumers(self, channel):
        return [Consumer(channel, queues=[INVOICES], on_message=self.on_invoice, accept=["json"])]

    def on_invoice(self, message):
        record("invoice", body=message.payload)
        message.ack()


for step in (OfWorker, Unwanted):
    app.steps["worker"].add(step)
for step in (First, Second, Orders, Invoices, Unwanted):
    app.steps["consumer"].add(step)
