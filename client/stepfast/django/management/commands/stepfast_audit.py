"""`manage.py stepfast_audit`."""

import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError


class Command(BaseCommand):
    help = "Check a skill file: every fault at once, then its canvas. Needs the package of the workers, stepfast-app."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("skill", help="A skill file, or its folder.")
        parser.add_argument(
            "--json", action="store_true", dest="as_json", help="Print what `stepfast audit --json` does."
        )

    def handle(self, *_: Any, **options: Any) -> None:
        beside = Path(sys.executable).with_name("stepfast")
        program = str(beside) if beside.exists() else shutil.which("stepfast")
        if program is None:
            raise CommandError("The command stepfast is not installed here. Audit where the workers are.", returncode=3)
        command = [program, "audit", options["skill"], *(["--json"] if options["as_json"] else [])]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
        self.stdout.write(done.stdout, ending="")
        if done.returncode:
            sys.exit(done.returncode)
