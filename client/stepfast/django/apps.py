"""The installable app."""

from django.apps import AppConfig


class StepfastConfig(AppConfig):
    name = "stepfast.django"
    label = "stepfast"
    verbose_name = "Stepfast"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from django.core.exceptions import ImproperlyConfigured

        from stepfast import client
        from stepfast.django import checks  # noqa: F401  # registers them
        from stepfast.django.conf import configuration
        from stepfast.django.databases import DjangoDatabase

        try:
            found = configuration()
        except ImproperlyConfigured:
            return  # the system check says it
        client.configure(
            client.Client(
                broker=found.broker_or_app(),
                database=lambda: DjangoDatabase(found.database),
                input_max_bytes=found.input_max_bytes,
            )
        )
