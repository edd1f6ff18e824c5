"""`manage.py stepfast_runs`."""

import json
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from stepfast.django.commands import database, sentences
from stepfast.operating import LIST_MAX, list_runs, table


class Command(BaseCommand):
    help = "List runs, newest first."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--state", help="Only runs in this state, such as failed.")
        parser.add_argument("--pipeline", help="Only runs of this pipeline.")
        parser.add_argument("--limit", type=int, default=20, help=f"At most so many (20; up to {LIST_MAX}).")
        parser.add_argument("--json", action="store_true", dest="as_json", help="Print a list of runs.")

    def handle(self, *_: Any, **options: Any) -> None:
        if not 1 <= options["limit"] <= LIST_MAX:
            raise CommandError(f"--limit is 1 to {LIST_MAX}.", returncode=2)
        with sentences():
            names = ("state", "pipeline", "limit")
            runs = list_runs(database(), **{name: options[name] for name in names})
        if options["as_json"]:
            self.stdout.write(json.dumps(runs, indent=2))
        else:
            self.stdout.write(table(runs) if runs else "There is no such run.")
