"""What `manage.py stepfast_watch` calls, at least once for each run that ends."""

from typing import Any

from shop.models import Order


def note_failure(run: Any, **_: Any) -> None:  # noqa: ANN401  # a row of stepfast.django's
    """An order whose run failed says so; told twice, it says the same."""
    if run.state != "completed":
        Order.objects.filter(run_id=run.id, state="new").update(note=f"Its fulfilment is {run.state}.")
