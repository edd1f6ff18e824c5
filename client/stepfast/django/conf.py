"""The setting STEPFAST: a dictionary, checked by name."""

import difflib
from dataclasses import dataclass, fields
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from stepfast.client import INPUT_MAX_BYTES


@dataclass(frozen=True, slots=True)
class Configuration:
    """One field a key, in capitals.

    `database` is the alias of the database that holds Stepfast. `broker` is the URL of its broker, or the dotted path
    of your own Celery app where that shares it.
    """

    database: str = "default"
    broker: str | None = None
    input_max_bytes: int = INPUT_MAX_BYTES

    def broker_or_app(self) -> Any:  # a Celery app is untyped
        """What `stepfast.Client` takes."""
        return import_string(self.broker) if self.broker and "://" not in self.broker else self.broker


def configuration() -> Configuration:
    """The project's. Raises ImproperlyConfigured, naming the bad key."""
    given = getattr(settings, "STEPFAST", {})
    if not isinstance(given, dict):
        raise ImproperlyConfigured("STEPFAST must be a dictionary.")
    known = {field.name.upper(): field.name for field in fields(Configuration)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
            raise ImproperlyConfigured(f"STEPFAST has {name!r}, which is no setting. {hint}")
    made = Configuration(**{known[name]: value for name, value in given.items()})
    if made.database not in settings.DATABASES:
        raise ImproperlyConfigured(f"STEPFAST names the database {made.database!r}, which DATABASES lacks.")
    return made
