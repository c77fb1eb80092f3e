"""``moa`` as a launcher starts it, with something that happens to one of its processes.

``EVENTS`` holds ``KIND:PROCESS:CALL`` for each start of the run, with commas between them: at that call of the reward
the process is asked to stop, is killed, or fails. ``STARTS`` is a file that grows by one line with each start.
"""

import os
import signal
import sys
from pathlib import Path

from moa_lightning.cli import main
from tests.helpers import interruptions


def fail() -> None:
    raise RuntimeError("the reward of this process is broken")


EVENTS = {"ask": interruptions.ask, "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "fail": fail}


def prepare(process: str) -> None:
    """Have it happen at this start."""
    marks = Path(os.environ["STARTS"]).with_suffix(f".{process}")
    start = len(marks.read_text()) if marks.exists() else 0
    marks.write_text("x" * (start + 1))
    events = os.environ["EVENTS"].split(",")
    kind, whose, call = (events[start] if start < len(events) else "::").split(":")
    if whose == process:
        interruptions.begin(int(call), EVENTS[kind])


if __name__ == "__main__":
    prepare(os.environ.get("LOCAL_RANK", "0"))
    main(sys.argv[1:])
