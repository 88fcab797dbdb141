"""The tasks of the apps that an agent watches."""


def add_tasks(app):
    @app.task(name="add")
    def add(x, y):
        return x + y

    @app.task(name="fail")
    def fail():
        raise ValueError("seen by the agent")

    @app.task(name="parent_of")
    def parent_of():
        return add.delay(1, 1).id
