"""Makes the user admin, with the password in EXAMPLE_PASSWORD: a new one at each start of the example."""

import os
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand


class Command(BaseCommand):
    help = __doc__

    def handle(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        user, _created = get_user_model().objects.get_or_create(username="admin", is_staff=True, is_superuser=True)
        user.set_password(os.environ["EXAMPLE_PASSWORD"])
        user.save()
