"""System checks: the setting, and (with `check --database`) whether the database has Stepfast and lets us in."""

from collections.abc import Sequence
from typing import Any

from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004  # Django's names
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connections

from stepfast.django.conf import configuration
from stepfast.django.databases import DjangoDatabase
from stepfast.errors import StepfastError


@register(Tags.compatibility)
def check_settings(**_: Any) -> list[CheckMessage]:
    try:
        found = configuration()
    except (ImproperlyConfigured, TypeError) as error:
        return [Error(str(error), hint="See docs/django.md.", id="stepfast.E001")]
    if connections[found.database].vendor != "postgresql":
        return [
            Error(
                f"STEPFAST names the database {found.database!r}, which is no Postgres.",
                hint="Give Stepfast's database an alias of its own, and name that: STEPFAST = {'DATABASE': ...}.",
                id="stepfast.E002",
            )
        ]
    if not found.broker:
        return [
            Warning(
                "STEPFAST names no BROKER: runs start within two seconds, and not at once.",
                hint="Name the broker's URL, or silence this check.",
                id="stepfast.W001",
            )
        ]
    return []


@register(Tags.database)
def check_database(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    try:
        alias = configuration().database
    except (ImproperlyConfigured, TypeError):
        return []
    if alias not in (databases or ()):
        return []
    try:
        DjangoDatabase(alias).read("select count(*) from stepfast.v_pipelines")
    except (StepfastError, DatabaseError) as error:
        return [Error(str(error), hint="On a host of the workers: stepfast migrate --client ROLE", id="stepfast.E003")]
    return []
