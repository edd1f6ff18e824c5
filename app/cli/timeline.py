"""`stepfast show RUN --timeline`: a waterfall. A row an attempt, with what was waited for before it; details below."""

import sys
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from textwrap import wrap
from typing import TYPE_CHECKING
from uuid import UUID

from app.cli import output
from app.runs.states import AttemptState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.text import Text

    from app.execution.worker import Worker
    from app.pipelines.model import Json

PIPED_WIDTH_CHARS = 100
BAR_MIN_CHARS = 12
AGENT_MAX_CHARS = 20
OUTCOME_CHARS = 12
TIME_CHARS = 11
COST_CHARS = 9
MESSAGE_MAX_CHARS = 300
VALUE_MAX_CHARS = 80
TICK_CHARS = 16
# Waits that are shorter, and that nobody ordered, are not told.
WAIT_TOLD_SHARE = 0.02
# A stretch in which nothing executes is drawn shorter where it is longer than all that executes.
IDLE_SHARE = 0.2


def document(worker: "Worker", run_id: UUID) -> "Json":
    """The timeline of a run as it is now: see `app.runs.timeline`."""
    from app import operations
    from app.runs.reads import Reads
    from app.runs.timeline import timeline

    reads = Reads(worker.store.engine)
    run = operations.document(worker, run_id)
    events = reads.event_list(run_id)
    pipeline = worker.definition(run["pipeline_hash"])
    return timeline(run, events, pipeline, workers=reads.worker_places(run), now=datetime.now(UTC))


def show(document: "Json") -> None:
    """Prints it, as wide as the terminal is; a pipe gets no colours, and each detail as one line."""
    console = output.console()
    piped = not sys.stdout.isatty()
    width = PIPED_WIDTH_CHARS if piped else console.width
    print(output.one_line(head(document)))
    print()
    glyphs = ASCII if console.options.ascii_only else UNICODE
    for line in Waterfall(document, width, glyphs).lines(wrapped=not piped):
        console.print(line, soft_wrap=True)
    print()
    for sentence in foot(document):
        print(output.one_line(sentence))


def head(document: "Json") -> str:
    """How the run stands, what it cost, and what of that was wasted."""
    totals, wasted = document["totals"], document["totals"]["wasted"]
    partial = " in part" if document["partial"] else ""
    calls = _count(totals["calls"], "paid call")
    cost = "at an unknown price" if totals["cost_usd"] is None else output.dollars(totals["cost_usd"])
    spent = f"{calls}, {cost}, {totals['input_tokens']:,} tokens in, {totals['output_tokens']:,} out"
    who = f"Run {output.short(document['run_id'])} of {document['pipeline']} {document['version']}"
    stands = f"{who}: {document['state']}{partial}, {output.seconds(document['seconds'])} since it was enqueued"
    return f"{stands}; {spent if totals['calls'] else 'no paid call'}. Wasted: {wasted_words(wasted)}."


def wasted_words(wasted: "Json") -> str:
    """What was paid for and not used."""
    parts = []
    if wasted["calls"]:
        cost = "at an unknown price" if wasted["cost_usd"] is None else output.dollars(wasted["cost_usd"])
        parts.append(f"{_count(wasted['calls'], 'paid call')}, {cost}")
    if wasted["unknown_calls"]:
        parts.append(f"{_count(wasted['unknown_calls'], 'call')} lost with a worker, which may have been paid for")
    return " and ".join(parts) or "nothing"


def foot(document: "Json") -> "Iterator[str]":
    """Whether anything was executed more than once."""
    for entry in document["repeated"]:
        why = f" ({', '.join(entry['because'])})" if entry["because"] else ""
        committed = {0: "none was committed", 1: "one was committed"}.get(
            entry["commits"], f"{entry['commits']} were committed"
        )
        of = f" in generation {entry['generation']}" if entry["generation"] > 1 else ""
        yield f"{entry['agent']} was executed {entry['executions']} times{of}{why}; {committed}."
    if not document["repeated"]:
        yield "Nothing was executed twice."


# The picture.


@dataclass(frozen=True, slots=True)
class Glyphs:
    executing: str
    broken: str
    waits: "dict[str, str]"
    edge: str
    gap: str


UNICODE = Glyphs("█", "✗", {"dependencies": "·", "retry": "▒", "person": "─", "": "░"}, "│", "≈")
ASCII = Glyphs("#", "x", {"dependencies": ".", "retry": "-", "person": "~", "": ":"}, "|", "/")
_MEANS = {"dependencies": "for what it depends on", "retry": "for a retry's time", "person": "for a person"}
_MEANS[""] = "for a worker, its turn or a key"
_STYLES = {
    AttemptState.COMPLETED: "green",
    AttemptState.FAILED: "red",
    AttemptState.LOST: "magenta",
    AttemptState.EXECUTING: "cyan",
    AttemptState.SUSPENDED: "yellow",
}
_BROKEN = {AttemptState.FAILED, AttemptState.LOST}


class Scale:
    """From a time, in seconds since the beginning, to a column.

    Linear, but for stretches in which nothing executes: a night in which a person was waited for would leave no room
    for the rest. `gaps` are those that are drawn shorter.
    """

    def __init__(self, busy: "Sequence[tuple[float, float]]", end_s: float, columns: int) -> None:
        edges: list[tuple[float, float]] = []
        for start, end in sorted(busy):
            if edges and start <= edges[-1][1]:
                edges[-1] = edges[-1][0], max(edges[-1][1], end)
            else:
                edges.append((start, end))
        worked_s = sum(end - start for start, end in edges)
        points = [0.0, *(at for edge in edges for at in edge), end_s]
        self.gaps: list[tuple[float, float]] = []
        self._at_s, self._drawn = [0.0], [0.0]
        for number, (start, end) in enumerate(pairwise(points)):
            length = max(0.0, end - start)
            if number % 2 == 0 and length > worked_s > 0:  # every other stretch is idle
                self.gaps.append((start, end))
                length = worked_s * IDLE_SHARE
            self._at_s.append(max(start, end))
            self._drawn.append(self._drawn[-1] + length)
        self._columns = columns

    def column(self, at_s: float) -> float:
        """From 0 to the number of columns."""
        whole = self._drawn[-1]
        if whole <= 0:
            return 0.0
        number = min(max(bisect_right(self._at_s, at_s) - 1, 0), len(self._at_s) - 2)
        length = self._at_s[number + 1] - self._at_s[number]
        share = min(1.0, max(0.0, (at_s - self._at_s[number]) / length)) if length else 0.0
        drawn = self._drawn[number] + share * (self._drawn[number + 1] - self._drawn[number])
        return drawn / whole * self._columns

    def at_s(self, column: float) -> float:
        """The time of a column: the inverse."""
        drawn = column / self._columns * self._drawn[-1]
        number = min(max(bisect_right(self._drawn, drawn) - 1, 0), len(self._drawn) - 2)
        length = self._drawn[number + 1] - self._drawn[number]
        share = min(1.0, (drawn - self._drawn[number]) / length) if length else 0.0
        return self._at_s[number] + share * (self._at_s[number + 1] - self._at_s[number])


class Waterfall:
    """The lines of a timeline, at most `width` characters wide where a bar can be drawn at all."""

    def __init__(self, document: "Json", width: int, glyphs: Glyphs) -> None:
        self._document, self._width, self._glyphs = document, width, glyphs
        self._start = datetime.fromisoformat(document["created_at"])
        agents = [len(step["agent"]) for step in document["steps"]]
        self._agent_chars = min(max(agents, default=0), AGENT_MAX_CHARS)
        self._costs = width >= 72
        right = TIME_CHARS + (COST_CHARS + 1 if self._costs else 0)
        self._bar_chars = max(BAR_MIN_CHARS, width - self._agent_chars - OUTCOME_CHARS - right - 5)
        segments = [segment for step in document["steps"] for segment in step["segments"]]
        busy = [self._span(segment) for segment in segments if segment["kind"] == "attempt"]
        ends = [self._span(segment)[1] for segment in segments]
        marks = [self._s(mark["started_at"]) for mark in document["marks"]]
        self._scale = Scale(busy, max([*ends, *marks, 0.0]), self._bar_chars)
        self._used: set[str] = set()

    def lines(self, *, wrapped: bool) -> "Iterator[Text]":
        """The axis, the rows with their details, and what the glyphs mean."""
        from rich.text import Text

        yield from self._axis()
        for step in self._document["steps"]:
            name = output.cut(step["agent"], self._agent_chars)
            for row in _rows(step["segments"]):
                yield self._row(name, step, row)
                name = ""
                for text, style in _details(row, self._document["seconds"] * WAIT_TOLD_SHARE):
                    yield from self._detail(text, style, wrapped=wrapped)
        for mark in self._document["marks"]:
            if mark["name"] not in {"enqueued", "suspended", "continued"}:
                at = f"{output.moment(mark['started_at'])} UTC"
                yield from self._detail(f"{at}: the run {_mark_words(mark)[9:]}", "dim", wrapped=wrapped, indent=0)
        yield Text("")
        yield from self._detail(self._legend(), "dim", wrapped=wrapped, indent=0)

    def _axis(self) -> "Iterator[Text]":
        """The times, and below them how long what is drawn shorter is."""
        from rich.text import Text

        whole, count = self._bar_chars, max(1, self._bar_chars // TICK_CHARS)
        ticks = [whole * number / count for number in (0, count, *range(1, count))]  # both ends have a right to theirs
        times = _written(whole, ((at, lasting(self._scale.at_s(at)) if at else "0") for at in ticks))
        indent = " " * (self._agent_chars + OUTCOME_CHARS + 3)
        head = f"{indent}{times} {'time':>{TIME_CHARS}}"
        yield Text(f"{head} {'cost':>{COST_CHARS}}" if self._costs else head, style="bold")
        if self._scale.gaps:
            gaps = [(self._scale.column(start), lasting(end - start)) for start, end in self._scale.gaps]
            yield Text(indent + _written(whole, ((at, self._glyphs.gap + length) for at, length in gaps)), style="dim")

    def _row(self, name: str, step: "Json", row: "list[Json]") -> "Text":
        from rich.text import Text

        attempt = next((segment for segment in row if segment["kind"] == "attempt"), None)
        style = _STYLES[attempt["state"]] if attempt else "dim"
        line = Text().append(f"{name:<{self._agent_chars}} ", style="bold")
        line.append(f"{_outcome(attempt, step):<{OUTCOME_CHARS}} ", style=style)
        line.append(self._glyphs.edge, style="dim")
        line.append_text(self._bar(row))
        line.append(self._glyphs.edge, style="dim")
        waits = [segment["seconds"] for segment in row if segment["kind"] == "wait"]
        spent = attempt["seconds"] if attempt else sum(waits)
        line.append(f"{'' if attempt and attempt['by'] else lasting(spent):>{TIME_CHARS}}")
        if self._costs:
            line.append(f" {_cost(attempt) if attempt else '':>{COST_CHARS}}")
        return line

    def _bar(self, row: "list[Json]") -> "Text":
        from rich.text import Text

        cells: list[tuple[str, str]] = [(" ", "")] * self._bar_chars
        for segment in row:
            if segment["kind"] == "mark":
                continue
            start, end = (self._scale.column(at) for at in self._span(segment))
            first, last = min(round(start), self._bar_chars - 1), min(round(end), self._bar_chars)
            if segment["kind"] == "wait":
                kind = segment["for"] if segment["for"] in self._glyphs.waits else ""
                cell = self._glyphs.waits[kind], "dim"
                if last > first:
                    self._used.add(kind)
            else:
                cell = self._glyphs.executing, _STYLES[segment["state"]]
                last = max(last, first + 1)
            cells[first:last] = [cell] * (last - first)
            if segment["kind"] == "attempt" and segment["state"] in _BROKEN:
                cells[last - 1] = self._glyphs.broken, _STYLES[segment["state"]]
        bar = Text()
        for char, style in cells:
            bar.append(char, style=style)
        return bar

    def _detail(self, text: str, style: str, *, wrapped: bool, indent: int | None = None) -> "Iterator[Text]":
        from rich.text import Text

        margin = " " * (self._agent_chars + 3 if indent is None else indent)
        room = max(20, self._width - len(margin))
        clean = output.one_line(text)
        lines = wrap(clean, room, subsequent_indent="  ", break_on_hyphens=False) if wrapped else [clean]
        for line in lines:
            yield Text(f"{margin}{line}", style=style)

    def _legend(self) -> str:
        parts = [f"{self._glyphs.executing} executing", f"{self._glyphs.broken} failed or lost"]
        parts += [f"{self._glyphs.waits[kind]} waiting {_MEANS[kind]}" for kind in _MEANS if kind in self._used]
        if self._scale.gaps:
            parts.append(f"{self._glyphs.gap} nothing executes: drawn shorter")
        return ", ".join(parts)

    def _span(self, segment: "Json") -> tuple[float, float]:
        start = self._s(segment["started_at"])
        return start, max(start, self._s(segment["ended_at"] or self._document["now"]))

    def _s(self, at: str) -> float:
        return max(0.0, (datetime.fromisoformat(at) - self._start).total_seconds())


def _written(chars: int, labels: "Iterable[tuple[float, str]]") -> str:
    """Labels at their columns, on one line; one that has no room is left out."""
    line = [" "] * chars
    for at, label in labels:
        left = max(0, min(int(at), chars - len(label)))
        if all(char == " " for char in line[max(0, left - 1) : left + len(label) + 1]):
            line[left : left + len(label)] = label
    return "".join(line)[:chars]


def _rows(segments: "Sequence[Json]") -> "Iterator[list[Json]]":
    """An attempt with what went before it and what followed at its end; last, what leads to no attempt."""
    row: list[Json] = []
    for segment in segments:
        if segment["kind"] != "mark" and any(entry["kind"] == "attempt" for entry in row):
            yield row
            row = []
        row.append(segment)
    if row:
        yield row


def _outcome(attempt: "Json | None", step: "Json") -> str:
    if attempt is None:
        return f"  {step['state']}"
    word = str(attempt["state"])
    if attempt["by"]:
        word = "by hand"
    elif attempt["reused"]:
        word = "reused"
    elif word == AttemptState.SUSPENDED:
        word = "asked"
    return f"{attempt['number']} {word}"


def _cost(attempt: "Json") -> str:
    if attempt["cost_usd"] is not None:
        return output.dollars(attempt["cost_usd"])
    return "?" if attempt["maybe_paid"] else ""


def lasting(seconds: float) -> str:
    """A duration, to the millisecond below a second."""
    return f"{seconds * 1_000:.0f} ms" if seconds < 0.9995 else output.seconds(seconds)


# What is said below a row.

_USUAL = {"dependencies", "queue"}


def _details(row: "list[Json]", told_from_s: float) -> "Iterator[tuple[str, str]]":
    """Sentences, each with its style. Waits for dependencies or a worker are told if they lasted so long."""
    attempt = next((segment for segment in row if segment["kind"] == "attempt"), None)
    waits = [
        _wait_words(segment)
        for segment in row
        if segment["kind"] == "wait" and (segment["seconds"] >= told_from_s or segment["for"] not in _USUAL)
    ]
    facts = [*_attempt_words(attempt), *waits] if attempt else waits
    if facts:
        yield "; ".join(facts), "dim"
    if attempt and attempt["gate"]:
        yield _gate_words(attempt["gate"]), "red" if attempt["gate"]["verdict"] == "refused" else "dim"
    if attempt and attempt["code"] and attempt["code"] != "gate_refused":  # which the line before said
        yield f"{attempt['code']}: {output.cut(str(attempt['message']), MESSAGE_MAX_CHARS)}", _STYLES[attempt["state"]]
    for segment in row:
        if segment["kind"] != "mark" or segment["name"] == "rerun":
            continue
        known = attempt and attempt["message"] and str(attempt["message"]) in segment["text"]
        yield _mark_words({**segment, "text": ""} if known else segment), "dim"


def _attempt_words(attempt: "Json") -> "Iterator[str]":
    if attempt["by"]:
        yield f"{attempt['by']} gave its output by hand"
        return
    generation = f"generation {attempt['generation']}, " if attempt["generation"] > 1 else ""
    where = f" ({attempt['where']})" if attempt["where"] else ""
    after = f", which rescued it from worker {attempt['after']}" if attempt["after"] is not None else ""
    yield f"{generation}worker {attempt['worker']}{where}{after}"
    if attempt["reused"]:
        yield "took what its key had given"
    if attempt["input_tokens"] is not None:
        model = f"{attempt['model']}: " if attempt["model"] else ""
        yield f"{model}{attempt['input_tokens']:,} tokens in, {attempt['output_tokens'] or 0:,} out"


def _wait_words(wait: "Json") -> str:
    detail = wait["detail"]
    why = detail.get("code") or (output.short(detail["held_by"]) if detail.get("held_by") else "")
    word = "waits" if wait["ended_at"] is None else "waited"
    return f"{word} {lasting(wait['seconds'])} {wait['text'].removeprefix('waited ')}{f' ({why})' if why else ''}"


def gate_values(values: "Json") -> str:
    """What a gate read, by name."""
    return ", ".join(f"{name} = {output.cut(repr(value), VALUE_MAX_CHARS)}" for name, value in values.items())


def _gate_words(gate: "Json") -> str:
    verdict = {"error": "could not be evaluated"}.get(
        gate["verdict"], gate["verdict"]
    ) or "not known to have been asked"
    return f"gate {gate['expression']} {verdict}: {gate_values(gate['values'])}"


_MARKS = {
    "discarded": "given up, with a dead letter",
    "dismissed": "its dead letter was discarded",
    "fenced": "its late commit was refused",
    "reopened": "to be done again",
    "settled": "settled by its late commit",
    "stale_input": "waits for newer outputs than those it found",
    "stale_read": "read outputs that had been superseded, as its snapshots allow",
    "expired": "nobody approved it in time",
    "resumed": "was resumed",
    "cancelled": "was cancelled",
}


def _mark_words(mark: "Json") -> str:
    by = f" by {mark['by']}" if mark["by"] else ""
    text = f": {output.cut(mark['text'], MESSAGE_MAX_CHARS)}" if mark["text"] else ""
    cost = mark["detail"].get("cost_usd")
    paid = f", {output.dollars(cost)} paid in vain" if cost is not None else ""
    word = _MARKS.get(mark["name"], mark["name"])
    if letter := mark["detail"].get("dead_letter"):
        word = f"{word} ({output.short(letter)})"
    return f"{mark['started_at'][11:19]} {word}{by}{text}{paid}"


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
