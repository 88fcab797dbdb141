"""Settings with which root is refused."""

broker_url = "memory://"
accept_content = ["pickle", "json"]
