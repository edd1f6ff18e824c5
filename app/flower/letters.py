"""The pages and the API of dead letters: grouped by what went wrong, those of a group, one, and closing it."""

from typing import TYPE_CHECKING
from uuid import UUID

from tornado import web

from app import operations
from app.flower import view
from app.flower.door import API_VALUE_MAX_BYTES, Api, Door, Page
from app.redaction import cut_json, redact
from app.runs.explain import NOT_BY_RESUME, explain
from app.runs.reads import Reads
from app.words import moment, short

if TYPE_CHECKING:
    from app.execution.worker import Worker
    from app.pipelines.model import Json

GROUPS_MAX = 100
PAGE_LETTERS = 50


class LettersPage(Page):
    async def get(self) -> None:
        """The groups; or with `fingerprint`, the letters of one."""
        if self.get_argument("fingerprint", None) is None:
            groups = await _groups(self)
            self.render("dead_letters.html", groups=[_group(entry) for entry in groups], letters=None, older=None)
            return
        letters, older = await _letters(self)
        self.render("dead_letters.html", groups=None, letters=[_row(entry) for entry in letters], older=older)


class LettersApi(Api):
    async def get(self) -> None:
        """`{"groups": [{error_fingerprint, count, oldest, newest, example, run_id, agent, code, payload}]}`.

        With `fingerprint`: `{"letters": […], "older": id}`; `older`, as `before`, asks for what comes below.
        """
        if self.get_argument("fingerprint", None) is None:
            self.write({"groups": _cut(await _groups(self))})
            return
        letters, older = await _letters(self)
        self.write({"letters": _cut(letters), "older": older})


class LetterPage(Page):
    async def get(self, letter: str) -> None:
        shown = await self.ask(lambda worker: _letter_page(worker, UUID(letter)))
        self.render("dead_letter.html", letter=shown, read_only=self.application.options.read_only)


class LetterApi(Api):
    async def get(self, letter: str) -> None:
        """The dead letter; `payload` is the message of the dead-letter queue."""
        found = await self.ask(lambda worker: Reads(worker.store.engine).dead_letter(UUID(letter)))
        (shown,) = _cut([found])
        self.write(shown)


class LetterDiscard(Page):
    async def get(self, letter: str) -> None:
        found = await self.ask(lambda worker: Reads(worker.store.engine).dead_letter(UUID(letter)))
        if found["resolved_at"]:
            raise web.HTTPError(409, f"It was resolved at {moment(found['resolved_at'])} UTC ({found['resolution']}).")
        said = [
            f"The letter of {found['agent']} is closed, and {found['agent']} stays discarded: nothing is done again.",
            "A later resume of its run does the step again all the same.",
        ]
        self.render(
            "confirm.html",
            title="Discard this dead letter?",
            button="Discard",
            danger=True,
            run_id=found["run_id"],
            back=("stepfast_letter", letter),
            said=[view.text(sentence) for sentence in said],
            fields=[("message", view.text(found["payload"].get("message", "")))],
            values=[],
            table=None,
            hidden={},
            choices=[],
            chosen=None,
            asks_reason=False,
        )

    async def post(self, letter: str) -> None:
        person = self.person
        await self.ask(lambda worker: operations.discard_letter(worker, UUID(letter), by=person))
        self.redirect(self.reverse_url("stepfast_letters"), status=303)


async def _groups(handler: Door) -> "list[Json]":
    return await handler.ask(lambda worker: Reads(worker.store.engine).dead_letter_groups(limit=GROUPS_MAX))


async def _letters(handler: Door) -> "tuple[list[Json], str | None]":
    """The open letters of one error, and the id below which there are more."""
    fingerprint, before = handler.get_argument("fingerprint"), _before(handler)
    found = await handler.ask(
        lambda worker: Reads(worker.store.engine).dead_letter_list(
            fingerprint=fingerprint, before=before, limit=PAGE_LETTERS + 1
        )
    )
    return found[:PAGE_LETTERS], found[PAGE_LETTERS - 1]["id"] if len(found) > PAGE_LETTERS else None


def _letter_page(worker: "Worker", letter_id: UUID) -> "Json":
    reads = Reads(worker.store.engine)
    found = reads.dead_letter(letter_id)
    run_id = UUID(found["run_id"])
    run = reads.run(run_id)
    payload = found["payload"]
    details = redact(payload.get("details"))
    facts = {
        "Pipeline": payload["pipeline"],
        "Agent": found["agent"],
        "Code": found["code"],
        "Attempts": payload["attempts"],
        "Created": f"{moment(found['created_at'])} UTC",
        "Fingerprint": found["error_fingerprint"],
    }
    resolved = f"{moment(found['resolved_at'])} UTC, {found['resolution']} by {found['resolved_by']}"
    # As it was when the letter was sent; one that no worker has sent yet is explained as it is now.
    told = payload.get("explanation") or explain(run, reads.event_list(run_id)).text
    return _row(found) | {
        "facts": [(name, view.text(entry)) for name, entry in facts.items()],
        "message": view.text(payload.get("message", "")),
        "why": view.text(told),
        "details": view.value(details) if details else [],
        "resolved": view.text(resolved) if found["resolved_at"] else "",
        "held": NOT_BY_RESUME.get(found["code"], ""),
        "may_resume": found["resolved_at"] is None and (run["state"] in {"failed", "cancelled"} or run["partial"]),
    }


def _group(entry: "Json") -> "Json":
    return _row(entry | {"id": entry["example"], "created_at": entry["newest"]}) | {
        "count": f"{entry['count']:,}",
        "fingerprint": entry["error_fingerprint"],
    }


def _row(entry: "Json") -> "Json":
    return {
        "id": entry["id"],
        "run_id": entry["run_id"],
        "run": short(entry["run_id"]),
        "pipeline": view.text(entry["payload"]["pipeline"]),
        "agent": entry["agent"],
        "code": entry["code"],
        "at": moment(entry["created_at"]),
        "message": view.text(entry["payload"].get("message", "")),
        "held": NOT_BY_RESUME.get(entry["code"], ""),
    }


def _cut(found: "list[Json]") -> "list[Json]":
    shown = redact(found)
    assert isinstance(shown, list)
    return [entry | {"payload": cut_json(entry["payload"], API_VALUE_MAX_BYTES)} for entry in shown]


def _before(handler: Door) -> UUID | None:
    given = handler.get_argument("before", "")
    try:
        return UUID(given) if given else None
    except ValueError:
        raise web.HTTPError(400, "before is the id of a dead letter.") from None
