"""A step that says when and where it began, and lasts as long as the run's input says."""

import os
import threading
import time
from pathlib import Path
from typing import Any

from app.agents import Context


def hold(ctx: Context) -> dict[str, Any]:
    """Appends `wall-clock seconds, pid` to the file `began`, and waits `hold_s`, or until the file `go` is there."""
    given = ctx.run.input
    if "began" in given:
        with Path(given["began"]).open("a") as began:
            began.write(f"{time.time():.6f} {os.getpid()}\n")
    end = time.monotonic() + given["hold_s"]
    pause = threading.Event()
    while time.monotonic() < end and not ("go" in given and Path(given["go"]).exists()):
        pause.wait(min(0.02, given["hold_s"]))
    return {"by": os.getpid()}
