"""A worker's listener, as a probe and a scraper see it."""

import re
import urllib.error
import urllib.request

from support.servers import free_port

SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Listener:
    """The address to give to a worker, and what is answered there."""

    def __init__(self):
        self.address = f"127.0.0.1:{free_port()}"

    def ask(self, path, timeout=30):
        """Status and text; (None, why) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()
        except OSError as error:
            return None, str(error)

    def metrics(self):
        """`{(name, frozenset of labels): value}`."""
        status, text = self.ask("/metrics")
        assert status == 200, text
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                match = SAMPLE.match(line)
                assert match, line
                labels = frozenset(LABEL.findall(match["labels"] or ""))
                assert (match["name"], labels) not in found, line
                found[match["name"], labels] = float(match["value"])
        return found

    def sums(self, *labels):
        """Sums of all samples of a name, by the values of these labels; zeros left out."""
        sums = {}
        for (name, found), value in self.metrics().items():
            values = dict(found)
            if value and all(label in values for label in labels):
                key = (name, *(values[label] for label in labels))
                sums[key] = sums.get(key, 0) + value
        return sums
