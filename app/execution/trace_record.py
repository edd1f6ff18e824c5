"""From what is recorded of a run to the spans of its segments, steps and attempts. Pure, but that it reads outputs.

A segment is a run from its start, or from its resume, to its end; later ones are linked to the one before, and stand
under the first. Its steps stand under it: one span for an agent, a generation and a segment, over all attempts. What
was exported before is left out, and so is what may still go on.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING
from uuid import UUID

from app.observe.traces import Span, error_text, span_id
from app.observe.vendors import Attributes, Kind
from app.pipelines.model import canonical_json
from app.redaction import capped, cut_json, redact
from app.runs.traces import ENDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from app.pipelines.model import Json, Pipeline
    from app.runs.traces import Due

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OVER = ("completed", "discarded", "cancelled")
_LABELS_MAX_BYTES = 2_000


@dataclass(slots=True)
class Segment:
    start: datetime
    end: datetime | None = None
    state: str = ""


class Record:
    """One run's record, and what of it is to be exported now. `value_max_bytes` bounds what is shown of a value.

    `read` gives an attempt's output. Each is read once, and only what is shown of it is kept: a run may have gigabytes.
    """

    def __init__(
        self,
        found: "Json",
        pipeline: "Pipeline",
        due: "Due",
        value_max_bytes: int,
        read: "Callable[[UUID], Json | None]",
    ) -> None:
        self.run, self.steps = found["run"], {step["agent"]: step for step in found["steps"]}
        self._pipeline, self._due, self._value_max_bytes = pipeline, due, value_max_bytes
        self._read, self._outputs = read, dict[UUID, object]()
        self._segments = _segments(self.run["created_at"], found["turns"])
        self._tries: dict[tuple[str, int, int], list[Json]] = {}
        for entry in found["attempts"]:
            key = (entry["agent"], entry["generation"], self._segment_of(entry["started_at"]))
            self._tries.setdefault(key, []).append(entry)
        self._ended = [entry for entry in found["attempts"] if entry["ended_at"] and not self._sent_attempt(entry)]
        self._over = [key for key in self._tries if self._is_over(key) and not self._sent(self._step_id(key))]

    def waiting(self) -> "list[Callable[[], Span]]":
        """What is to be exported now, parents before their children. Each is made when it is called."""
        return [
            *(
                partial(self._of_segment, number)
                for number, segment in enumerate(self._segments)
                if segment.end and not self._sent(self._segment_id(number))
            ),
            *(partial(self._of_step, key) for key in self._over),
            *(partial(self._of_attempt, entry) for entry in self._ended),
        ]

    # Ids.

    def _segment_id(self, number: int) -> int:
        return span_id(Kind.RUN, self.run["id"], number)

    def _step_id(self, key: tuple[str, int, int]) -> int:
        return span_id(Kind.STEP, self.run["id"], *key)

    def _sent(self, span: int) -> bool:
        return f"{span:016x}" in self._due.sent

    def _sent_attempt(self, entry: "Json") -> bool:
        return self._sent(span_id(Kind.ATTEMPT, entry["id"]))

    # What is over.

    def _segment_of(self, at: datetime) -> int:
        return max(number for number, segment in enumerate(self._segments) if number == 0 or segment.start <= at)

    def _is_over(self, key: tuple[str, int, int]) -> bool:
        agent, generation, segment = key
        step = self.steps[agent]
        if not all(entry["ended_at"] for entry in self._tries[key]):
            return False
        left = generation < step["generation"] or segment < len(self._segments) - 1
        return left or self._segments[-1].end is not None or step["state"] in _OVER

    # Spans.

    def _of_segment(self, number: int) -> Span:
        run, segment, pipeline = self.run, self._segments[number], self._pipeline
        assert segment.end is not None
        tries = [entry for key, entries in self._tries.items() if key[2] == number for entry in entries]
        attributes: Attributes = {
            **self._names(),
            "stepfast.pipeline_hash": run["pipeline_hash"],
            "stepfast.version": pipeline.version,
            "stepfast.tenant": run["tenant"],
            "stepfast.state": segment.state,
            "stepfast.segment": number + 1,
            **_cost(tries),
        }
        if run["labels"]:
            attributes["stepfast.labels"] = canonical_json(capped(run["labels"], _LABELS_MAX_BYTES))
        shown_out = None
        if pipeline.tracing.log_outputs and number == len(self._segments) - 1:
            shown_out = self._shown({agent: self.steps[agent]["attempt_id"] for agent in self._last_agents()})
        link = (run["id"].int, self._segment_id(number - 1)) if number else _linked(self._due.traceparent)
        return Span(
            Kind.RUN,
            pipeline.name,
            self._segment_id(number),
            self._segment_id(0) if number else None,
            _ns(segment.start),
            _ns(segment.end),
            attributes,
            error=None if segment.state == "completed" else segment.state,
            shown_in=self._shown_input if pipeline.tracing.log_inputs else None,
            shown_out=shown_out,
            link=link,
        )

    def _of_step(self, key: tuple[str, int, int]) -> Span:
        agent, generation, segment = key
        tries, step = self._tries[key], self.steps[agent]
        last = tries[-1]
        # Its state now, unless it went on in another generation or segment since.
        is_newest = generation == step["generation"] and segment == len(self._segments) - 1
        state = step["state"] if is_newest and step["state"] in _OVER else last["state"]
        end = max(entry["ended_at"] for entry in tries)
        if is_newest and step["ended_at"]:
            end = max(end, step["ended_at"])
        attributes: Attributes = {
            **self._names(),
            "stepfast.agent": agent,
            "stepfast.generation": generation,
            "stepfast.attempts": len(tries),
            "stepfast.state": state,
            **_cost(tries),
        }
        return Span(
            Kind.STEP,
            agent,
            self._step_id(key),
            self._segment_id(segment),
            _ns(tries[0]["started_at"]),
            _ns(end),
            attributes,
            error=None if state == "completed" else self._error(last) or state,
            shown_out=self._shown_out(last),
        )

    def _of_attempt(self, entry: "Json") -> Span:
        agent = entry["agent"]
        attributes: Attributes = {
            **self._names(),
            "stepfast.agent": agent,
            "stepfast.attempt_id": str(entry["id"]),
            "stepfast.generation": entry["generation"],
            "stepfast.number": entry["number"],
            "stepfast.state": entry["state"],
            **_cost([entry]),
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": agent,
        }
        of_some = {"worker": entry["worker_id"], "by": entry["decided_by"], "reused_from": entry["reused_from"]}
        attributes |= {f"stepfast.{name}": str(value) for name, value in of_some.items() if value is not None}
        if entry["code"]:
            attributes["stepfast.code"] = entry["code"]
        shown_in = None
        if self._pipeline.tracing.log_inputs:
            given = self._shown({name: UUID(of["attempt"]) for name, of in entry["reads"].items()})
            shown_in = self._cut({"input": self._shown_input, "outputs": given})
        return Span(
            Kind.ATTEMPT,
            f"{agent} attempt {entry['number']}",
            span_id(Kind.ATTEMPT, entry["id"]),
            self._step_id((agent, entry["generation"], self._segment_of(entry["started_at"]))),
            _ns(entry["started_at"]),
            _ns(entry["ended_at"]),
            attributes,
            error=self._error(entry),
            shown_in=shown_in,
            shown_out=self._shown_out(entry),
        )

    # What is shown.

    def _names(self) -> Attributes:
        return {"stepfast.run_id": str(self.run["id"]), "stepfast.pipeline": self._pipeline.name}

    def _error(self, entry: "Json") -> str | None:
        return error_text(entry, shows_errors(self._pipeline)) if entry["code"] else None

    @cached_property
    def _shown_input(self) -> object:
        return self._cut(redact(self.run["input"], self._pipeline.input_schema))

    def _output(self, agent: str, attempt: UUID) -> object:
        """What is shown of an output; None where there is none."""
        if attempt not in self._outputs:
            output = self._read(attempt)
            shown = None if output is None else self._cut(redact(output, self._pipeline.by_id[agent].schema))
            self._outputs[attempt] = shown
        return self._outputs[attempt]

    def _shown(self, attempts: "Mapping[str, UUID | None]") -> object:
        """The outputs of these attempts, by agent, of those that have any."""
        found = {agent: self._output(agent, attempt) for agent, attempt in attempts.items() if attempt}
        return self._cut({agent: output for agent, output in found.items() if output is not None})

    def _shown_out(self, entry: "Json") -> object:
        return self._output(entry["agent"], entry["id"]) if self._pipeline.tracing.log_outputs else None

    def _cut(self, value: object) -> object:
        return cut_json(value, self._value_max_bytes)

    def _last_agents(self) -> list[str]:
        """Those on which nobody depends: what they put out is the run's output."""
        before = {name for agent in self._pipeline.agents for name in agent.depends_on}
        return [agent.id for agent in self._pipeline.agents if agent.id not in before]


def shows_errors(pipeline: "Pipeline") -> bool:
    """What an error says may quote what went in and what came out."""
    return pipeline.tracing.log_inputs and pipeline.tracing.log_outputs


def _segments(created_at: datetime, turns: "list[Json]") -> list[Segment]:
    found = [Segment(created_at)]
    for turn in turns:
        if turn["name"] in ENDS:
            found[-1].end, found[-1].state = turn["at"], turn["name"].removeprefix("run.")
        elif found[-1].end is not None:  # what had not ended is only rearranged by a resume
            found.append(Segment(turn["at"]))
    return found


def _cost(entries: "list[Json]") -> Attributes:
    """US dollars, where every call has a price. Not by the name that providers add up: they count the calls."""
    costs = [entry["cost_usd"] if entry["usage"] else 0 for entry in entries]
    return {} if None in costs else {"stepfast.cost_usd": sum(map(float, costs))}


def _ns(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1) * 1_000


def _linked(traceparent: str | None) -> tuple[int, int] | None:
    """The trace and span ids of a W3C traceparent, which a host wrote."""
    try:
        _, trace, span, _ = (traceparent or "").split("-")
        ids = int(trace, 16), int(span, 16)
    except ValueError:
        return None
    return ids if 0 < ids[0] < 2**128 and 0 < ids[1] < 2**64 else None
