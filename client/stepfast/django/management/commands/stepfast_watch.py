"""`manage.py stepfast_watch`: sends the signal `run_ended`."""

import contextlib
import threading
import time
from argparse import ArgumentParser
from datetime import datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand
from django.db import InterfaceError, OperationalError, close_old_connections

from stepfast.django.commands import sentences
from stepfast.django.models import Run
from stepfast.django.signals import run_ended
from stepfast.errors import NotReady
from stepfast.operating import plain, since

POLL_S = 1.0
# So long a database that does not answer is asked again: a restart, a failover. Then whoever supervises this decides.
OUTAGE_MAX_S = 900.0
# An end is looked for so long after its time: the transaction that recorded it may have taken that long to commit.
OVERLAP_S = 30
PAGE_RUNS = 500


class Command(BaseCommand):
    help = (
        "Send the signal run_ended for each run that ends, oldest first, until Ctrl-C. At least once: started anew it "
        "repeats what ended within --since, so that nothing is missed meanwhile."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--since", default="1h", help="Begin with what ended since then: 2h, 3d or an ISO time (1h)."
        )
        parser.add_argument("--once", action="store_true", help="End once everything that has ended is sent.")

    def handle(self, *_: Any, **options: Any) -> None:
        with sentences(), contextlib.suppress(KeyboardInterrupt):
            self._watch(since(options["since"]), once=options["once"])

    def _watch(self, place: datetime, *, once: bool) -> None:
        sent: dict[tuple[Any, Any], None] = {}
        pause = threading.Event()
        answered_s = time.monotonic()
        while True:
            page = Run.objects.filter(ended_at__gte=place).order_by("ended_at", "id")
            try:
                new = [run for run in page[: PAGE_RUNS + len(sent)] if (run.id, run.ended_at) not in sent]
            except (OperationalError, InterfaceError) as error:
                self._bear(error, answered_s, once=once)
                pause.wait(POLL_S)
                continue
            for run in new:
                self._send(run)
                sent[run.id, run.ended_at] = None
            answered_s = time.monotonic()
            if new:
                # What was sent within the overlap is remembered, so that it is not sent again.
                place = max(place, new[-1].ended_at - timedelta(seconds=OVERLAP_S))
                sent = {key: None for key in sent if key[1] >= place}
            elif once:
                return
            else:
                close_old_connections()
                pause.wait(POLL_S)

    def _bear(self, error: Exception, answered_s: float, *, once: bool) -> None:
        """Says that the database does not answer, and drops the connection. Raises NotReady where that lasts."""
        said = plain((str(error).strip().splitlines() or [type(error).__name__])[0])
        if once or time.monotonic() - answered_s > OUTAGE_MAX_S:
            raise NotReady(f"The database does not answer: {said}", next_step="Start it, and then this.") from error
        self.stderr.write(f"The database does not answer, and is asked again: {said}")
        close_old_connections()

    def _send(self, run: Run) -> None:
        """A receiver that fails is named, and keeps no other from its signal."""
        for receiver, answer in run_ended.send_robust(sender=Run, run=run):
            if isinstance(answer, Exception):
                self.stderr.write(f"{receiver} failed for run {run.id}: {answer!r}")
