"""Records what Celery's saferepr shows: rows of [JSON text, longest length or null, text].

python tests/messages/record_saferepr.py > tests/messages/saferepr.json
"""

import json
import random
import sys

from celery.utils.saferepr import saferepr

choice = random.Random(7)
words = ["a", "it's", "some words in a row", 'quo"te', "b\\s\n", "\u00fc\u20ac\U0001f600", "x" * 30, ""]


def value(depth):
    kind = choice.randrange(9 if depth else 6)
    if kind >= 6:
        size = choice.randrange(5)
        if kind == 6:
            return {choice.choice(words) + str(index): value(depth - 1) for index in range(size)}
        return [value(depth - 1) for _ in range(size)]
    return [
        choice.choice(words),
        choice.choice(words),
        choice.random(),
        choice.randrange(10**12),
        None,
        True,
    ][kind]


rows = []
for number in range(150):
    text = json.dumps(value(5) if number < 20 else [value(4) for _ in range(4)])
    for length in [None, choice.randrange(1, 120), 1024]:
        rows.append([text, length, saferepr(json.loads(text), length)])
print("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]", file=sys.stdout)
