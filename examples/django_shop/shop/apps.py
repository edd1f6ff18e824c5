"""The shop, and what it does when a run of its own ends."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "shop"

    def ready(self) -> None:
        from stepfast.django import run_ended

        from shop.ended import note_failure

        run_ended.connect(note_failure)
