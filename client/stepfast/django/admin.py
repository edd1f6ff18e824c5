"""The admin: runs, steps, attempts and dead letters, to be looked at; and what a person may order, once confirmed."""

import json
from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin import helpers
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.html import format_html

from stepfast.django.conf import configuration
from stepfast.django.databases import DjangoDatabase
from stepfast.django.models import Attempt, DeadLetter, Run, Step
from stepfast.django.starting import run as handle_of
from stepfast.errors import Misuse, NotEnded, StepfastError
from stepfast.runs import Request, RunHandle, Status

RUNS_AT_ONCE_MAX = 100
# How long a page waits for a worker, in all, to be able to say what became of an order.
ANSWER_MAX_S = 5.0
EVENTS_SHOWN_MAX = 200
PIPELINES_MAX = 200
_PIPELINES = "select name from stepfast.v_pipelines order by name limit %s::integer"


class StateFilter(admin.SimpleListFilter):
    """The states by name: Django's own filter would read the whole view to find them."""

    title = "state"
    parameter_name = "state"

    def lookups(self, _request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(state, state) for state in model_admin.states]

    def queryset(self, _request: HttpRequest, queryset: Any) -> Any:
        return queryset.filter(state=self.value()) if self.value() else queryset


class PipelineFilter(admin.SimpleListFilter):
    title = "pipeline"
    parameter_name = "pipeline"

    def lookups(self, _request: HttpRequest, _model_admin: object) -> list[tuple[str, str]]:
        rows = DjangoDatabase(configuration().database).read(_PIPELINES, (PIPELINES_MAX,))
        return [(name, name) for (name,) in rows]

    def queryset(self, _request: HttpRequest, queryset: Any) -> Any:
        return queryset.filter(pipeline=self.value()) if self.value() else queryset


@admin.display(description="run", ordering="run")
def run_link(row: Any) -> Any:
    address = reverse("admin:stepfast_run_change", args=[row.run_id])
    return format_html('<a href="{}">{}</a>', address, str(row.run_id)[:8])


class ReadOnlyAdmin(admin.ModelAdmin):
    show_full_result_count = False
    list_per_page = 50

    def has_add_permission(self, _request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, _request: HttpRequest, _obj: object = None) -> bool:
        return False

    def has_delete_permission(self, _request: HttpRequest, _obj: object = None) -> bool:
        return False

    def has_resume_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("stepfast.resume_run"))

    def has_approve_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("stepfast.approve_run"))

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("stepfast.cancel_run"))

    def confirmed(
        self, request: HttpRequest, queryset: Any, title: str, items: list[Any], order: Callable[[str], list[Request]]
    ) -> HttpResponse | None:
        """Asks first; once that is posted, orders, and says what became of it. `items` are what the page lists."""
        if len(items) > RUNS_AT_ONCE_MAX:
            self.message_user(request, f"Choose at most {RUNS_AT_ONCE_MAX} at once.", messages.ERROR)
        elif not items:
            self.message_user(request, "Nothing of this waits for that.", messages.WARNING)
        elif request.POST.get("confirmed"):
            try:
                self._say(request, order(request.POST.get("reason", "")[:500] or ""))
            except StepfastError as error:
                self.message_user(request, str(error), messages.ERROR)
        else:
            context = {
                **self.admin_site.each_context(request),
                "title": title,
                "opts": self.opts,
                "items": items,
                "chosen": list(queryset.values_list("pk", flat=True)),
                "action": request.POST["action"],
                "checkbox": helpers.ACTION_CHECKBOX_NAME,
                "media": self.media,
            }
            return TemplateResponse(request, "admin/stepfast/confirm.html", context)
        return None

    def _say(self, request: HttpRequest, ordered: list[Request]) -> None:
        if not ordered:
            said = "Nothing was ordered: what waits now is not what the page showed. Look again."
            self.message_user(request, said, messages.WARNING)
        left_s = ANSWER_MAX_S
        for number, one in enumerate(ordered, 1):
            try:
                one.wait(left_s)
                self.message_user(request, f"{number} of {len(ordered)}: done.", messages.SUCCESS)
            except NotEnded:
                left_s = 0.0
                self.message_user(request, f"{number} of {len(ordered)}: ordered; a worker will see to it.")
            except Misuse as error:
                self.message_user(request, f"{number} of {len(ordered)}: {error}", messages.ERROR)


@admin.register(Run)
class RunAdmin(ReadOnlyAdmin):
    list_display = ("name", "pipeline", "how", "progress", "created_at", "cost_usd", "key")
    fields = (
        ("pipeline", "version", "how"),
        ("created_at", "started_at", "ended_at"),
        ("key", "labels", "cost_usd"),
        ("tenant", "priority", "deadline_at"),
    )
    readonly_fields = ("how",)
    list_filter = (StateFilter, "partial", PipelineFilter, "created_at")
    states = ("pending", "running", "suspended", "completed", "failed", "cancelled")
    search_fields = ("id", "key", "pipeline")
    search_help_text = "An id or its beginning, a key, or a pipeline."
    ordering = ("-created_at",)
    actions = ("resume", "approve", "reject", "cancel")

    @admin.display(description="run", ordering="id")
    def name(self, run: Run) -> str:
        return str(run.id)[:8]

    @admin.display(description="state", ordering="state")
    def how(self, run: Run) -> str:
        return f"{run.state}{' in part' if run.partial else ''}"

    @admin.display(description="steps")
    def progress(self, run: Run) -> str:
        return f"{run.completed}/{run.steps}"

    @admin.action(description="Resume", permissions=["resume"])
    def resume(self, request: HttpRequest, queryset: Any) -> HttpResponse | None:
        runs, by = _runs(queryset), request.user.get_username()
        return self.confirmed(
            request,
            queryset,
            "Resume these runs?",
            [str(run) for run in queryset[: RUNS_AT_ONCE_MAX + 1]],
            lambda reason: [run.resume(by=by, reason=reason) for run in runs],
        )

    @admin.action(description="Cancel", permissions=["cancel"])
    def cancel(self, request: HttpRequest, queryset: Any) -> HttpResponse | None:
        runs, by = _runs(queryset), request.user.get_username()
        return self.confirmed(
            request,
            queryset,
            "Cancel these runs?",
            [str(run) for run in queryset[: RUNS_AT_ONCE_MAX + 1]],
            lambda reason: [run.cancel(by=by, reason=reason) for run in runs],
        )

    @admin.action(description="Approve what waits", permissions=["approve"])
    def approve(self, request: HttpRequest, queryset: Any) -> HttpResponse | None:
        return self._decide(request, queryset, "Approve this?", approved=True)

    @admin.action(description="Reject what waits", permissions=["approve"])
    def reject(self, request: HttpRequest, queryset: Any) -> HttpResponse | None:
        return self._decide(request, queryset, "Reject this?", approved=False)

    def _decide(self, request: HttpRequest, queryset: Any, title: str, *, approved: bool) -> HttpResponse | None:
        by = request.user.get_username()
        asks = [(run, ask) for run in _runs(queryset) for ask in run.status().asks]
        seen = set(request.POST.getlist("digest"))

        def order(reason: str) -> list[Request]:
            # Only what the page showed: what is asked since then was not seen.
            return [
                (run.approve if approved else run.reject)(ask.agent, by=by, reason=reason, digest=ask.digest)
                for run, ask in asks
                if ask.digest in seen
            ]

        items = [
            {
                "agent": ask.agent,
                "run": str(run.id),
                "digest": ask.digest,
                "shown": json.dumps(ask.shown, indent=2, ensure_ascii=False),
            }
            for run, ask in asks
        ]
        return self.confirmed(request, queryset, title, items, order)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """The run's page: its steps in order, attempts, events, and buttons for what this person may order."""
        return super().change_view(
            request, object_id, form_url, {**(extra_context or {}), **self._page(request, object_id)}
        )

    def _page(self, request: HttpRequest, object_id: str) -> dict[str, Any]:
        if not self.has_view_permission(request):
            return {}  # Django refuses
        try:
            run = handle_of(object_id)
            status = run.status()
        except Misuse:
            return {}  # Django says that there is no such run
        steps = {step.agent: step for step in Step.objects.filter(run=run.id)}
        return {
            "steps": [steps[agent] for agent in status.steps if agent in steps],
            "attempts": Attempt.objects.filter(run=run.id).order_by("started_at"),
            "letters": DeadLetter.objects.filter(run=run.id).order_by("created_at"),
            "asks": status.asks,
            "events": run.events()[-EVENTS_SHOWN_MAX:],
            "buttons": self._buttons(request, status),
            "checkbox": helpers.ACTION_CHECKBOX_NAME,
        }

    def _buttons(self, request: HttpRequest, status: Status) -> list[tuple[str, str]]:
        may, asks = self.get_actions(request), bool(status.asks)
        resume = status.state in {"failed", "cancelled"} or status.partial
        fits = {"resume": resume, "approve": asks, "reject": asks, "cancel": not status.ended}
        return [(name, may[name][2]) for name in self.actions if name in may and fits[name]]


@admin.register(Step)
class StepAdmin(ReadOnlyAdmin):
    list_display = (
        "agent",
        run_link,
        "state",
        "generation",
        "attempts",
        "failures",
        "worker_losses",
        "scheduled_at",
        "ended_at",
    )
    list_display_links = None
    list_filter = (StateFilter,)
    states = (
        *("pending", "available", "executing", "retryable", "suspended"),
        *("completed", "skipped", "discarded", "cancelled"),
    )
    search_fields = ("run__id", "agent")


@admin.register(Attempt)
class AttemptAdmin(ReadOnlyAdmin):
    list_display = ("agent", "number", run_link, "state", "started_at", "ended_at", "model", "cost_usd", "error_code")
    list_display_links = None
    list_filter = (StateFilter, "started_at")
    states = ("executing", "completed", "failed", "lost", "suspended")
    search_fields = ("run__id", "agent", "error_message")
    ordering = ("-started_at",)


@admin.register(DeadLetter)
class DeadLetterAdmin(ReadOnlyAdmin):
    list_display = ("agent", "pipeline", run_link, "code", "message", "created_at", "resolution")
    list_display_links = None
    list_filter = (("resolved_at", admin.EmptyFieldListFilter), PipelineFilter, "code", "created_at")
    search_fields = ("run__id", "agent", "code", "message")
    ordering = ("-created_at",)
    actions = ("resume",)

    @admin.action(description="Resume the runs", permissions=["resume"])
    def resume(self, request: HttpRequest, queryset: Any) -> HttpResponse | None:
        letters, by = list(queryset[: RUNS_AT_ONCE_MAX + 1]), request.user.get_username()
        ids = sorted({letter.run_id for letter in letters})
        return self.confirmed(
            request,
            queryset,
            "Resume the runs of these dead letters?",
            [str(letter) for letter in letters],
            lambda reason: [handle_of(run_id).resume(by=by, reason=reason) for run_id in ids],
        )


def _runs(queryset: Any) -> list[RunHandle]:
    return [handle_of(run_id) for run_id in queryset.values_list("pk", flat=True)[: RUNS_AT_ONCE_MAX + 1]]
