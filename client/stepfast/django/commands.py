"""What the management commands share."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.core.management.base import CommandError

from stepfast.django.conf import configuration
from stepfast.django.databases import DjangoDatabase
from stepfast.errors import Misuse, NotReady, StepfastError
from stepfast.operating import plain


def database() -> DjangoDatabase:
    return DjangoDatabase(configuration().database)


@contextmanager
def sentences() -> Iterator[None]:
    """An error of ours becomes a sentence and an exit code: 1 failed, 2 misuse, 3 not ready."""
    try:
        yield
    except StepfastError as error:
        code = 2 if isinstance(error, Misuse) else 3 if isinstance(error, NotReady) else 1
        raise CommandError(plain(str(error)), returncode=code) from error
