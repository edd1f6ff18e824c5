"""What the database's functions refuse, in our words."""

import json
from typing import TYPE_CHECKING

from app.errors import KeyConflict, Misuse, UnknownName

if TYPE_CHECKING:
    from sqlalchemy.exc import DBAPIError


def sqlstate(error: "DBAPIError") -> str:
    """The code of what Postgres refused; empty where it gave none."""
    return getattr(error.orig, "sqlstate", None) or ""


def refusal(error: "DBAPIError", pipeline: str) -> Exception:
    """What enqueue_v1 raised, in our words."""
    match sqlstate(error):
        case "SF001":
            return UnknownName(
                f"No pipeline is published as {json.dumps(pipeline)}.", next_step="Run: stepfast publish SKILL"
            )
        case "SF002":
            said = str(error.orig).splitlines()[0]
            return KeyConflict(f"The {said}.", next_step="Use another key, or the same input.")
        case "SF003":
            said = str(error.orig).splitlines()[0]
            return Misuse(f"{said[:1].upper()}{said[1:]}.")
        case _:
            return error
