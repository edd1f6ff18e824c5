"""`manage.py stepfast_resume`."""

from argparse import ArgumentParser
from getpass import getuser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from stepfast.django.commands import database, sentences
from stepfast.django.starting import run
from stepfast.operating import resume_failed, since


class Command(BaseCommand):
    help = (
        "Continue a failed run from its last checkpoint, or all failed runs that a resume can mend. Where more than 5 "
        "failed alike, one goes first, and the others only if it gets past the step that failed."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("--run", help="This run, by its whole id.")
        which.add_argument("--failed", action="store_true", help="All failed runs.")
        parser.add_argument("--pipeline", help="With --failed: only runs of this pipeline.")
        parser.add_argument("--since", help="With --failed: only what failed since 2h, 3d or an ISO time.")
        parser.add_argument(
            "--plan", action="store_true", help="With --failed: say what would be resumed, and do nothing."
        )
        parser.add_argument("--by", default=None, help="Who orders it, for the record (you).")

    def handle(self, *_: Any, **options: Any) -> None:
        by = options["by"] or getuser()
        if options["run"] and (options["pipeline"] or options["since"] or options["plan"]):
            raise CommandError("--pipeline, --since and --plan go with --failed.", returncode=2)
        with sentences():
            if options["run"]:
                agents = run(options["run"]).resume(by=by).wait()["agents"]
                self.stdout.write(f"Run {options['run']} goes on{' with ' if agents else ''}{', '.join(agents)}.")
                return
            begin = since(options["since"]) if options["since"] else None
            wanted = {"pipeline": options["pipeline"], "begin": begin, "plan": options["plan"]}
            good = resume_failed(database(), by=by, tell=self.stdout.write, **wanted)
        if not good:
            raise CommandError("Not all were resumed.", returncode=1)
