"""The pages and the API of runs: the list, one run, and what a person may do to it, each after a confirmation."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import UUID

from tornado import web

from app import operations
from app.flower import view
from app.flower.door import API_VALUE_MAX_BYTES, Api, Door, Page
from app.redaction import cut_json, redact
from app.runs.asked import asked
from app.runs.reads import Reads
from app.runs.resume_plan import sentences
from app.runs.states import RunState, StepState
from app.words import dollars, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.execution.worker import Worker
    from app.pipelines.model import Json

PAGE_RUNS = 50
API_RUNS_MAX = 200
API_EVENTS_MAX = 1_000
REASON_MAX_CHARS = 500
AGES = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7)}


class RunsPage(Page):
    async def get(self) -> None:
        filters = _filters(self)
        found = await self.ask(lambda worker: Reads(worker.store.engine).run_list(limit=PAGE_RUNS + 1, **filters))
        chosen = {name: _argument(self, name) for name in ("state", "pipeline", "label", "since")}
        given = {name: value for name, value in chosen.items() if value}
        self.render(
            "runs.html",
            runs=view.run_rows(found[:PAGE_RUNS]),
            states=[state.value for state in RunState],
            ages=list(AGES),
            chosen=chosen,
            newest=urlencode(given) if filters["before"] else None,
            older=urlencode(given | {"before": found[PAGE_RUNS - 1]["id"]}) if len(found) > PAGE_RUNS else None,
        )


class RunsApi(Api):
    async def get(self) -> None:
        """`{"runs": […], "older": id}`; `older`, as `before`, asks for what comes below. Newest first."""
        filters = _filters(self)
        limit = self.get_argument("limit", str(PAGE_RUNS), type=int)
        if not 1 <= limit <= API_RUNS_MAX:
            raise web.HTTPError(400, f"limit must be 1 to {API_RUNS_MAX}.")
        found = await self.ask(lambda worker: Reads(worker.store.engine).run_list(limit=limit + 1, **filters))
        older = found[limit - 1]["id"] if len(found) > limit else None
        self.write({"runs": redact(found[:limit]), "older": older})


class RunPage(Page):
    async def get(self, run: str) -> None:
        """The page; or 204, for whoever follows it and has `seen` all events."""
        run_id, seen = UUID(run), _argument(self, "seen")
        if seen and str(await self.ask(lambda worker: Reads(worker.store.engine).event_seq(run_id))) == seen:
            self.set_status(204)
            return
        shown = await self.ask(lambda worker: _run_page(worker, run_id))
        self.render("run.html", run=shown, read_only=self.application.options.read_only)


def _run_page(worker: "Worker", run_id: UUID) -> "Json":
    # Before the run: what happens in between is in the run and not in the events, and is told again.
    events = Reads(worker.store.engine).event_list(run_id)
    found = operations.document(worker, run_id)
    return view.run_page(found, events, worker.definition(found["pipeline_hash"]))


class RunApi(Api):
    async def get(self, run: str) -> None:
        """The run as `stepfast show --json` prints it, with its newest events; large values are cut."""
        self.write(await self.ask(lambda worker: _run_document(worker, UUID(run))))


def _run_document(worker: "Worker", run_id: UUID) -> "Json":
    found = redact(operations.document(worker, run_id))
    assert isinstance(found, dict)
    found["input"] = cut_json(found["input"], API_VALUE_MAX_BYTES)
    for step in found["steps"]:
        step["feedback"] = cut_json(step["feedback"], API_VALUE_MAX_BYTES)
        for entry in step["tries"]:
            for name in ("output", "error"):
                entry[name] = cut_json(entry[name], API_VALUE_MAX_BYTES)
    events = Reads(worker.store.engine).event_list(run_id)
    found["events"] = redact(events[-API_EVENTS_MAX:])
    return found


# What a person may do. GET shows what will happen, POST does it.


class RunAction(Page):
    async def get(self, run: str, action: str) -> None:
        run_id, person = UUID(run), self.person
        if action == "resume":
            from_agent = _argument(self, "from") or None
            shown = await self.ask(lambda worker: _resume_plan(worker, run_id, person, from_agent))
        else:
            shown = await self.ask(lambda worker: _cancel_plan(worker, run_id))
        self.render("confirm.html", asks_reason=action == "cancel", **shown)

    async def post(self, run: str, action: str) -> None:
        run_id, person = UUID(run), self.person
        reason, from_agent = _reason(self), self.get_body_argument("from", "") or None
        if action == "resume":
            await self.ask(lambda worker: operations.resume(worker, run_id, person, from_agent=from_agent))
        else:
            await self.ask(lambda worker: operations.cancel(worker, run_id, by=person, reason=reason))
        self.redirect(self.reverse_url("stepfast_run", run), status=303)


class RunDecision(Page):
    async def get(self, run: str, decision: str, agent: str) -> None:
        shown = await self.ask(lambda worker: _decision_plan(worker, UUID(run), decision, agent))
        self.render("confirm.html", asks_reason=True, **shown)

    async def post(self, run: str, decision: str, agent: str) -> None:
        run_id, person, reason = UUID(run), self.person, _reason(self)
        digest = self.get_body_argument("digest")  # what the person saw
        became = await self.ask(
            lambda worker: operations.decide(
                worker, run_id, agent, approved=decision == "approve", by=person, reason=reason, digest=digest
            )
        )
        if became == "expired" and decision == "approve":
            raise web.HTTPError(409, f"The request had expired, so {agent} counts as rejected. Resume asks again.")
        self.redirect(self.reverse_url("stepfast_run", run), status=303)


def _resume_plan(worker: "Worker", run_id: UUID, person: str, from_agent: str | None) -> "Json":
    plan = operations.plan_resume(worker, run_id, person, from_agent=from_agent)
    where = f"from {from_agent}" if from_agent else "from its last checkpoint"
    rows = [
        (entry["agent"], entry["verdict"], entry["reason"], ", ".join(entry["changed"]), dollars(entry["cost_usd"]))
        for entry in plan["agents"]
    ]
    return _confirmation(
        run_id,
        f"Resume this run {where}?",
        button="Resume",
        table=(("Agent", "Plan", "Because", "Changed", "Cost"), rows),
        said=sentences(plan),
        hidden={"from": from_agent} if from_agent else {},
        choices=[entry["agent"] for entry in plan["agents"]],
        chosen=from_agent,
    )


def _cancel_plan(worker: "Worker", run_id: UUID) -> "Json":
    run = Reads(worker.store.engine).run(run_id)
    state = {step["agent"]: step["state"] for step in run["steps"]}
    fenced = [agent for agent in state if state[agent] == StepState.EXECUTING]
    kept = [agent for agent in state if state[agent] == StepState.COMPLETED]
    said = ["The run ends; a resume lets it go on."]
    said += [f"Completed, and kept: {', '.join(kept)}."] if kept else []
    said += [f"Executing now, and its answer will not be committed: {', '.join(fenced)}."] if fenced else []
    return _confirmation(run_id, "Cancel this run?", button="Cancel the run", danger=True, said=said)


def _decision_plan(worker: "Worker", run_id: UUID, decision: str, agent: str) -> "Json":
    run, pipeline, approval = operations.waiting(worker, run_id, agent)
    fields, values = asked(run, pipeline, agent, approval)
    mode = pipeline.by_id[agent].failure_mode
    approves = decision == "approve"
    said = f"{agent} is cancelled, and its failure mode, {mode}, says what becomes of the run."
    return _confirmation(
        run_id,
        f"{'Approve' if approves else 'Reject'} {agent}?",
        button="Approve" if approves else "Reject",
        danger=not approves,
        said=[
            "It begins at once. The approval is bound to the digest: what changes meanwhile is asked anew."
            if approves
            else said
        ],
        fields=[(name, one_line(given)) for name, given in fields.items()],
        values=[(title, view.value(given)) for title, given in values.items()],
        hidden={"digest": approval["digest"]},
    )


def _confirmation(run_id: UUID, title: str, *, button: str, said: list[str], **more: Any) -> "Json":  # noqa: ANN401
    """What confirm.html shows; whatever is not given is empty."""
    empty = {"danger": False, "fields": [], "values": [], "table": None, "hidden": {}, "choices": [], "chosen": None}
    return {
        "title": title,
        "button": button,
        "run_id": str(run_id),
        "back": ("stepfast_run", str(run_id)),
        "said": [view.text(sentence) for sentence in said],
        **empty,
        **more,
    }


# Arguments.


def _argument(handler: Door, name: str) -> str:
    """As it was given: the template escapes it."""
    return str(handler.get_argument(name, "", escape=False))


def _reason(handler: Door) -> str | None:
    return one_line(handler.get_body_argument("reason", ""))[:REASON_MAX_CHARS] or None


def _filters(handler: Door) -> "Json":
    """The arguments of `Reads.run_list`. Raises HTTPError for what is none."""
    label, since = _argument(handler, "label"), _argument(handler, "since")
    name, equals, wanted = label.partition("=")
    if label and not (name and equals):
        raise web.HTTPError(400, "A label is given as name=value.")
    state = _argument(handler, "state")
    if state and state not in set(RunState):
        raise web.HTTPError(400, f"A state is one of {', '.join(RunState)}.")
    return {
        "state": state or None,
        "pipeline": _argument(handler, "pipeline") or None,
        "labels": {name: wanted} if label else None,
        "since": _parsed(since, _moment, "since is 1h, 24h, 7d, or a time such as 2026-01-31T06:00."),
        "before": _parsed(_argument(handler, "before"), UUID, "before is the id of a run."),
    }


def _parsed(given: str, kind: "Callable[[str], Any]", refusal: str) -> Any:  # noqa: ANN401  # what `kind` makes of it
    try:
        return kind(given) if given else None
    except ValueError:
        raise web.HTTPError(400, refusal) from None


def _moment(given: str) -> datetime:
    """An age or a time, which is in UTC unless it says otherwise."""
    if given in AGES:
        return datetime.now(UTC) - AGES[given]
    at = datetime.fromisoformat(given)
    return at if at.tzinfo else at.replace(tzinfo=UTC)
