"""A Django connection, by its alias: whichever connection this thread has then."""

from typing import TYPE_CHECKING

from django.db import connections, transaction

from stepfast.errors import translated

if TYPE_CHECKING:
    from stepfast.databases import Call, Parameters, Rows


class DjangoDatabase:
    """Joins whatever `transaction.atomic()` is open on it."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def read(self, statement: str, parameters: "Parameters" = ()) -> "Rows":
        with translated(), connections[self.alias].cursor() as cursor:
            cursor.execute(statement, tuple(parameters))
            rows: Rows = cursor.fetchall()
            return rows

    write = read

    def after_commit(self, call: "Call") -> None:
        transaction.on_commit(call, using=self.alias, robust=True)
