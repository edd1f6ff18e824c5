"""`manage.py stepfast_watch`: sends the signal `run_ended`."""

import threading
from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand
from django.db import close_old_connections

from stepfast.django.commands import sentences
from stepfast.django.models import Run
from stepfast.django.signals import run_ended
from stepfast.operating import since

POLL_S = 1.0
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
        with sentences():
            place = since(options["since"])
        sent: dict[tuple[Any, Any], None] = {}
        pause = threading.Event()
        while True:
            page = Run.objects.filter(ended_at__gte=place).order_by("ended_at", "id")
            new = [run for run in page[: PAGE_RUNS + len(sent)] if (run.id, run.ended_at) not in sent]
            for run in new:
                self._send(run)
                sent[run.id, run.ended_at] = None
            if new:
                # What was sent within the overlap is remembered, so that it is not sent again.
                place = max(place, new[-1].ended_at - timedelta(seconds=OVERLAP_S))
                sent = {key: None for key in sent if key[1] >= place}
            elif options["once"]:
                return
            else:
                close_old_connections()
                pause.wait(POLL_S)

    def _send(self, run: Run) -> None:
        """A receiver that fails is named, and keeps no other from its signal."""
        for receiver, answer in run_ended.send_robust(sender=Run, run=run):
            if isinstance(answer, Exception):
                self.stderr.write(f"{receiver} failed for run {run.id}: {answer!r}")
