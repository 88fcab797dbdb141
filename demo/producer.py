"""The other process: calls the tasks of `proj` as any Celery program does, and checks what comes back."""

import sys

from celery import chord
from proj import add, divide, third_time_lucky, total

PATIENCE = 30  # seconds that any one answer may take


def show(call, answer):
    print(f"  {call:<47} -> {answer}", flush=True)


def main():
    wrong = []

    def expect(call, answer, right):
        show(call, answer)
        if answer != right:
            wrong.append(f"{call}: {right!r} was expected")

    expect("add.delay(4, 6)", add.delay(4, 6).get(timeout=PATIENCE), 10)

    failed = divide.delay(1, 0)
    try:
        failed.get(timeout=PATIENCE)
        wrong.append("divide.delay(1, 0) did not fail")
    except ZeroDivisionError as error:
        expect(
            "divide.delay(1, 0)",
            f"{failed.state}: {error!r}",
            "FAILURE: ZeroDivisionError('division by zero')",
        )
        print("".join(f"      | {line}\n" for line in failed.traceback.splitlines()), end="")
        if "return x / y" not in failed.traceback:
            wrong.append("the traceback does not show the line that failed")

    expect("third_time_lucky.delay()", third_time_lucky.delay().get(timeout=PATIENCE), "answered at try 3")
    expect(
        "chord(add.s(i, i) for i in range(5))(total.s())",
        chord(add.s(i, i) for i in range(5))(total.s()).get(timeout=PATIENCE),
        20,
    )

    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
