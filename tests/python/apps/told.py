"""Tasks that tell of themselves, and a boot step that does."""

from base import make_app
from celery import bootsteps

app = make_app("told")


@app.task(name="quiet", send_events=False)
def quiet():
    return None


@app.task(name="loud", bind=True)
def loud(self, number):
    self.send_event("task-half-way", number=number)
    return number


class News(bootsteps.StartStopStep):
    requires = {"celery.worker.consumer.events:Events"}

    def start(self, consumer):
        # Again and again, for whoever comes later.
        consumer.timer.call_repeatedly(0.5, lambda: consumer.event_dispatcher.send("custom-news", worth=7))


app.steps["consumer"].add(News)
