"""Traces, as a provider receives them from real workers: names, parents, attributes; what is killed, away or hidden."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from uuid import uuid4

import pytest
import stepfast
from conftest import eventually
from receiving import receiving
from sqlalchemy import text
from test_running import GATED, _began, _end_truce

from app import operations
from app.observe.traces import EXPORT_MAX_S, is_sampled, span_id
from app.observe.vendors import Kind
from app.simulator.script import parse
from app.simulator.server import Simulator

PROVIDERS = ("langfuse", "langsmith", "otlp")
MODEL = """
    - {id: writer, model: claude-sonnet-5-5, output_schema: text, queue: agents}
    - {id: sender, depends_on: [writer], gate: "{{writer.score}} > 0.5"}
"""
SCHEMA = """
    {"type": "object", "required": ["text", "score", "diagnosis"], "additionalProperties": false, "properties": {
     "text": {"type": "string"}, "score": {"type": "number"},
     "diagnosis": {"type": "string", "x-sensitive": true}}}
"""
REPLY = {"text": "Dear reader", "score": 0.9, "diagnosis": "the gout"}
USAGE = {
    "input_tokens": 100,
    "output_tokens": 50,
    "cache_read_input_tokens": 30,
    "cache_creation_input_tokens": 20,
    "thinking_tokens": 8,
}
PROMPT = "# System\n\nYou write.\n\n# User\n\nWrite about {{input.topic}}.\n"
HANDLERS = "    def sender(ctx): return {'sent': ctx.inputs['writer']['text']}\n"


@pytest.fixture
def receiver():
    with receiving() as made:
        yield made


def environ(receiver, *providers: str) -> dict[str, str]:
    """The settings by which a worker reaches the receiver."""
    every = {
        "langfuse": {
            "LANGFUSE_PUBLIC_KEY": "pk-1",
            "LANGFUSE_SECRET_KEY": "sk-2",
            "LANGFUSE_BASE_URL": receiver.url,
        },
        "langsmith": {
            "LANGSMITH_API_KEY": "ls-3",
            "LANGSMITH_ENDPOINT": receiver.url,
            "LANGSMITH_PROJECT": "shop",
        },
        "otlp": {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_EXPORTER_OTLP_HEADERS": "x-collector=secret-4"},
    }
    return {name: value for provider in providers or PROVIDERS for name, value in every[provider].items()}


def traced(folder, **fields):
    """The skill folder with its `tracing` section."""
    file = next(folder.glob("*.skill.yaml"))
    section = {"enabled": True, "provider": "otlp", "log_inputs": True, "log_outputs": True} | fields
    file.write_text(f"{file.read_text()}tracing: {json.dumps(section)}\n")
    return folder


def whole(receiver, run_id):
    """Waits until the run's last segment is exported, which is the last of its trace."""
    return eventually(
        lambda: [span for span in receiver.of(run_id) if "stepfast.segment" in span.attributes], what="the run's span"
    )[-1]


@pytest.fixture
def simulator(system):
    rule = {"reply": REPLY, "usage": USAGE}
    with Simulator(parse({"rules": [rule]})) as made:
        system.environ["ANTHROPIC_BASE_URL"] = made.url
        yield made


@pytest.fixture
def letter(system, simulator, write_skill):
    """Publishes a pipeline of a model and a handler, and runs it once. Returns the run."""

    def run(here, receiver, provider, *, waits=True, **fields):
        files = {"schemas/text.json": SCHEMA, "prompts/writer.md": PROMPT}
        files["schemas/topic.json"] = (
            '{"type": "object", "required": ["topic"], "properties": {"topic": {"type": "string"}, '
            '"name": {"type": "string", "x-sensitive": true}}}'
        )
        folder = write_skill(MODEL, HANDLERS, files=files, name=f"letter-{provider}")
        traced(folder, provider=provider, **fields)
        file = next(folder.glob("*.skill.yaml"))
        file.write_text(file.read_text() + "input_schema: topic\n")
        name = system.publish(here, folder)
        started = operations.start(here, name, {"topic": "autumn", "name": "Ada"}, labels={"shop": 7})
        run = system.ended(started.run_id)
        if waits:
            whole(receiver, run["id"])
        return run

    return run


def test_a_run_is_a_tree_of_spans_with_its_recorded_times(system, here, receiver, letter):
    """Run → step → attempt → gate, model call, handler, commit; ids that anybody can compute; the SDK's span is the call's."""
    system.start_worker(**environ(receiver, "otlp"))
    run = letter(here, receiver, "otlp")
    eventually(lambda: len(receiver.of(run["id"])) == 10, what="all spans")
    assert receiver.tree(run["id"]) == {
        "": ["letter-otlp"],
        "letter-otlp": ["sender", "writer"],
        "writer": ["writer attempt 1"],
        "writer attempt 1": ["anthropic.messages.create", "commit"],
        "sender": ["sender attempt 1"],
        "sender attempt 1": ["commit", "gate", "handlers:sender"],
    }
    root = receiver.one(run["id"], "letter-otlp")
    assert root.id == f"{span_id(Kind.RUN, run['id'], 0):016x}"
    assert _iso(root.start_ns) == run["created_at"][:23]
    assert _iso(root.end_ns) == run["ended_at"][:23]
    writer = run["steps"][0]
    attempt = receiver.one(run["id"], "writer attempt 1")
    assert attempt.id == f"{span_id(Kind.ATTEMPT, writer['tries'][0]['id']):016x}"
    step = receiver.one(run["id"], "writer")
    assert step.id == f"{span_id(Kind.STEP, run['id'], 'writer', 1, 0):016x}"
    assert (step.start_ns, step.end_ns) == (attempt.start_ns, attempt.end_ns)
    assert root.attributes["stepfast.state"] == "completed"
    assert root.attributes["stepfast.labels"] == '{"shop":7}'
    assert root.attributes["stepfast.cost_usd"] == pytest.approx(writer["tries"][0]["cost_usd"])
    gate = receiver.one(run["id"], "gate")
    assert gate.attributes["stepfast.gate.held"] is True
    assert gate.json("input.value") == {"writer.score": 0.9}
    assert {span.trace for span in receiver.spans} == {run["id"].replace("-", "")}


def _iso(ns: int) -> str:
    return datetime.fromtimestamp(ns // 1_000_000 / 1000, UTC).isoformat()[:23].ljust(23, "0")


def test_langfuse_shows_inputs_outputs_tokens_and_cost(system, here, receiver, letter):
    """By the attributes that Langfuse reads first; one generation for a call; what went through the cache is counted once."""
    system.start_worker(**environ(receiver))
    run = letter(here, receiver, "langfuse")
    eventually(lambda: len(receiver.of(run["id"])) == 10, what="all spans")
    types = sorted(span.attributes["langfuse.observation.type"] for span in receiver.of(run["id"]))
    assert types == [*["agent"] * 2, "chain", "generation", "guardrail", *["span"] * 4, "tool"]
    call = receiver.one(run["id"], "anthropic.messages.create")
    assert call.json("langfuse.observation.usage_details") == {
        "input": 100,
        "input_cached_tokens": 30,
        "input_cache_creation": 20,
        "output": 50,
        "total": 200,
    }
    cost = run["steps"][0]["tries"][0]["cost_usd"]
    assert call.json("langfuse.observation.cost_details") == {"total": pytest.approx(cost)}
    assert [message["role"] for message in call.json("langfuse.observation.input")] == ["system", "user"]
    assert "autumn" in call.json("langfuse.observation.input")[1]["content"]
    assert call.json("langfuse.observation.output") == {**REPLY, "diagnosis": "[redacted]"}
    assert call.attributes["gen_ai.response.model"] == "claude-sonnet-5-5"
    assert call.attributes["gen_ai.response.finish_reasons"] == ["end_turn"]
    root = receiver.one(run["id"], "letter-langfuse")
    assert root.attributes["langfuse.trace.name"] == "letter-langfuse"
    assert root.json("langfuse.trace.input") == {"topic": "autumn", "name": "[redacted]"}
    assert root.json("langfuse.trace.output") == {"sender": {"sent": "Dear reader"}}
    attempt = receiver.one(run["id"], "sender attempt 1")
    assert attempt.json("langfuse.observation.input")["outputs"] == {"writer": {**REPLY, "diagnosis": "[redacted]"}}
    # Cost and tokens by the names that Langfuse adds up stand on the generation alone.
    for span in receiver.of(run["id"]):
        counted = [name for name in span.attributes if "usage" in name or "cost_details" in name or "model" in name]
        assert not counted or span is call, (span.name, counted)
    path, headers = receiver.requests[0]
    assert path == "/api/public/otel/v1/traces"
    assert headers["authorization"] == "Basic cGstMTpzay0y"
    assert "secret-4" not in json.dumps(receiver.requests)  # the collector's, which the exporter would add


def test_langsmith_shows_inputs_outputs_tokens_and_cost(system, here, receiver, letter):
    """By the attributes of LangSmith's documentation, in its project."""
    system.start_worker(**environ(receiver))
    run = letter(here, receiver, "langsmith")
    eventually(lambda: len(receiver.of(run["id"])) == 10, what="all spans")
    kinds = sorted(span.attributes["langsmith.span.kind"] for span in receiver.of(run["id"]))
    assert kinds == [*["chain"] * 8, "llm", "tool"]
    call = receiver.one(run["id"], "anthropic.messages.create")
    assert call.json("langsmith.usage_metadata") == {
        "input_tokens": 150,
        "output_tokens": 50,
        "total_tokens": 200,
        "total_cost": pytest.approx(run["steps"][0]["tries"][0]["cost_usd"]),
        "input_token_details": {"cache_read": 30, "cache_creation": 20},
        "output_token_details": {"reasoning": 8},
    }
    assert call.attributes["gen_ai.prompt.0.role"] == "system"
    assert "autumn" in call.attributes["gen_ai.prompt.1.content"]
    assert call.json("gen_ai.completion.0.content") == {**REPLY, "diagnosis": "[redacted]"}
    assert receiver.one(run["id"], "letter-langsmith").json("gen_ai.completion") == {"sender": {"sent": "Dear reader"}}
    path, headers = receiver.requests[0]
    assert (path, headers["x-api-key"], headers["langsmith-project"]) == ("/otel/v1/traces", "ls-3", "shop")
    assert "secret-4" not in json.dumps(receiver.requests)


def test_any_collector_gets_the_conventions_for_generative_ai(system, here, receiver, letter):
    """gen_ai.*: model, tokens, finish reasons and messages; OpenTelemetry's own variables are obeyed."""
    system.start_worker(**environ(receiver))
    run = letter(here, receiver, "otlp")
    call = eventually(lambda: [span for span in receiver.of(run["id"]) if "anthropic" in span.name], what="the call")[0]
    assert call.attributes["gen_ai.operation.name"] == "chat"
    assert call.attributes["gen_ai.request.model"] == "claude-sonnet-5-5"
    assert (call.attributes["gen_ai.usage.input_tokens"], call.attributes["gen_ai.usage.output_tokens"]) == (150, 50)
    assert call.json("gen_ai.system_instructions")[0]["content"].startswith("You write.")
    (said,) = call.json("gen_ai.input.messages")
    assert "autumn" in said["parts"][0]["content"]
    (answered,) = call.json("gen_ai.output.messages")
    assert answered["finish_reason"] == "end_turn"
    assert json.loads(answered["parts"][0]["content"]) == {**REPLY, "diagnosis": "[redacted]"}
    assert receiver.requests[0][1]["x-collector"] == "secret-4"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_the_file_does_not_show_leaves_with_no_span(system, here, receiver, letter, provider):
    """log_inputs and log_outputs false: neither values nor what an error or a gate quotes of them."""
    system.start_worker(**environ(receiver))
    run = letter(here, receiver, provider, log_inputs=False, log_outputs=False)
    eventually(lambda: len(receiver.of(run["id"])) == 10, what="all spans")
    told = repr(receiver.spans)
    assert not [text for text in ("autumn", "Dear reader", "gout", "You write", "0.9") if text in told]
    assert '"total"' in told or "total_tokens" in told or "'gen_ai.usage.input_tokens': 150" in told


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_its_keys_a_provider_warns_once_and_the_logs_show_inputs(system, here, receiver, letter, provider):
    """One warning a process, which names what is missing; nothing is sent."""
    system.start_worker()
    letter(here, receiver, provider, waits=False)
    (warning,) = system.logged("traces.off")
    assert (warning["provider"], warning["level"]) == (provider, "warning")
    assert "set" in warning["message"]
    assert {line["agent"] for line in system.logged("step.input")} == {"writer", "sender"}
    assert receiver.requests == []


def test_with_its_keys_the_provider_shows_inputs_and_the_logs_do_not(system, here, receiver, letter):
    """Inputs and outputs are shown in one place."""
    system.start_worker(**environ(receiver))
    letter(here, receiver, "langfuse")
    assert [system.logged(event) for event in ("step.input", "step.output", "traces.off")] == [[], [], []]


def test_only_the_sampled_runs_are_shown(system, here, receiver, letter):
    """sample_rate 0 shows none; the share is that of a hash of the run's id, which every process decides alike."""
    system.start_worker(**environ(receiver))
    letter(here, receiver, "otlp", sample_rate=0.0, waits=False)
    assert system.logged("step.input") == []
    assert receiver.spans == []
    runs = [uuid4() for _ in range(2_000)]
    assert 400 < sum(is_sampled(run, 0.25) for run in runs) < 600
    assert all(is_sampled(run, 1.0) for run in runs)


def test_a_trace_survives_kill_9_and_rescue(system, here, receiver, write_skill, tmp_path):
    """The same trace: attempt 1 lost, under the step that attempt 2 completed elsewhere."""
    folder = write_skill("- {id: only, idempotent: true}", GATED + "\n    def only(ctx): return _pass(ctx, 'only')\n")
    name = system.publish(here, traced(folder))
    victim = system.start_worker(**environ(receiver))
    started = operations.start(here, name, {"folder": str(tmp_path)})
    eventually(lambda: _began(tmp_path, "only"), what="the step")
    _end_truce(system)
    system.start_worker(**environ(receiver))
    os.killpg(victim.pid, signal.SIGKILL)
    eventually(lambda: len(_began(tmp_path, "only")) == 2, what="the step elsewhere")
    (tmp_path / "only-go").touch()
    run = system.ended(started.run_id)
    whole(receiver, run["id"])
    first, second = (receiver.one(run["id"], f"only attempt {number}") for number in (1, 2))
    step = receiver.one(run["id"], "only")
    assert {first.parent, second.parent} == {step.id}
    assert (first.is_error, first.attributes["stepfast.state"]) == (True, "lost")
    assert first.status.startswith("worker_lost: ")
    assert (second.is_error, second.attributes["stepfast.state"]) == (False, "completed")
    assert (step.is_error, step.attributes["stepfast.attempts"]) == (False, 2)
    assert step.start_ns == first.start_ns < first.end_ns <= second.start_ns < second.end_ns == step.end_ns


def test_a_resume_is_a_linked_segment(system, here, receiver, write_skill):
    """A failed run's span ends; what goes on later is a span of its own in the same trace, linked to it."""
    folder = write_skill(
        "- {id: first, retry_policy: {max_attempts: 1}}",
        """
        import pathlib
        def first(ctx):
            if not pathlib.Path(ctx.run.input["file"]).exists():
                raise ValueError("not yet")
            return {}
        """,
    )
    name = system.publish(here, traced(folder))
    system.start_worker(**environ(receiver))
    file = system.folder / "there"
    run_id = operations.start(here, name, {"file": str(file)}).run_id
    failed = whole(receiver, run_id)
    assert (failed.is_error, failed.attributes["stepfast.state"], failed.parent) == (True, "failed", "")
    file.touch()
    operations.resume(here, run_id, "ada")
    went_on = eventually(
        lambda: [span for span in receiver.of(run_id) if span.attributes.get("stepfast.segment") == 2], what="segment 2"
    )[0]
    assert went_on.links == ((failed.trace, failed.id),)
    assert (went_on.parent, went_on.is_error) == (failed.id, False)
    steps = [span for span in receiver.of(run_id) if span.name == "first"]
    assert [(span.parent, span.is_error) for span in steps] == [(failed.id, True), (went_on.id, False)]
    assert len({span.id for span in receiver.of(run_id)}) == len(receiver.of(run_id))
    assert "ValueError: not yet" in receiver.one(run_id, "first attempt 1").status


def test_whoever_ends_a_run_its_trace_is_whole(system, here, receiver, write_skill):
    """A person's cancel, in a process that traces nothing: the run's and the step's spans are exported all the same."""
    folder = write_skill("- {id: only, requires_human_approval: true}", "    def only(ctx): return {}\n")
    name = system.publish(here, traced(folder))
    system.start_worker(**environ(receiver))
    run_id = operations.start(here, name, {}).run_id
    eventually(lambda: system.run(run_id)["state"] == "suspended", what="the approval")
    operations.cancel(here, run_id, by="ada")
    root = whole(receiver, run_id)
    assert (root.is_error, root.attributes["stepfast.state"]) == (True, "cancelled")
    assert receiver.tree(run_id) == {"": ["tested"], "tested": ["only"], "only": ["only attempt 1"]}


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_nothing_is_lost_when_a_worker_is_told_to_stop(system, here, receiver, write_skill, tmp_path, pool):
    """SIGTERM at once after the last commit: every span arrives, of each of the processes."""
    agents = "\n".join(f"    - {{id: a{number}}}" for number in range(4))
    handlers = "".join(f"    def a{number}(ctx): return {{}}\n" for number in range(4))
    name = system.publish(here, traced(write_skill(agents, handlers)))
    worker = system.start_worker(pool=pool, concurrency=4, **environ(receiver))
    runs = [operations.start(here, name, {}).run_id for _ in range(5)]
    for run_id in runs:
        system.ended(run_id)
    worker.terminate()
    assert worker.wait(20) == 0
    # A run; 4 steps, each with an attempt, a handler and a commit.
    assert [len({span.id for span in receiver.of(run_id)}) for run_id in runs] == [17] * 5
    assert system.logged("traces.dropped") == []


@pytest.mark.parametrize("failure", ["hangs", "refuses"])
def test_a_provider_that_is_away_slows_nothing_and_is_counted(system, here, receiver, write_skill, failure):
    """Steps neither wait nor fail; the worker stops in time; what is dropped is told with its count."""
    folder = traced(write_skill("- {id: only}", "    def only(ctx): return {}\n"))
    name = system.publish(here, folder)
    if failure == "hangs":
        receiver.hangs.set()
    else:
        receiver.status = 400
    worker = system.start_worker(**environ(receiver))
    runs = [operations.start(here, name, {}).run_id for _ in range(30)]
    ended = [system.ended(run_id) for run_id in runs]
    assert {run["state"] for run in ended} == {"completed"}
    times = sorted(datetime.fromisoformat(run[at]) for run in ended for at in ("created_at", "ended_at"))
    # All 90 spans were made, and no step waited for an export, which takes this long to fail.
    assert (times[-1] - times[0]).total_seconds() < EXPORT_MAX_S
    eventually(lambda: receiver.requests, what="an export that was tried")
    if failure == "refuses":
        (line,) = eventually(lambda: system.logged("traces.dropped"), what="a warning")
        assert line["spans"] > 0
        assert "400" in line["message"]
    worker.terminate()
    assert worker.wait(12) == 0
    assert sum(line["spans"] for line in system.logged("traces.dropped")) > 0


def test_what_is_recorded_is_exported_when_the_provider_is_back(system, here, receiver, letter):
    """The outbox keeps what a provider did not take: runs, steps and attempts arrive later, once each."""
    receiver.status = 400
    worker = system.start_worker(**environ(receiver))
    run = letter(here, receiver, "otlp", waits=False)
    eventually(lambda: system.logged("traces.late"), what="the warning")
    worker.terminate()
    assert worker.wait(15) == 0
    receiver.status = 200
    with here.store.engine.connect() as connection:
        connection.execute(text("update stepfast.meta set clock_offset = '31 s'"))
    system.start_worker(**environ(receiver))
    whole(receiver, run["id"])
    assert sorted(span.name for span in receiver.of(run["id"])) == [
        *("letter-otlp", "sender", "sender attempt 1", "writer", "writer attempt 1")
    ]


def test_a_run_is_linked_to_the_hosts_span(system, here, receiver, write_skill):
    """Client to broker to worker: the span in which a host starts a run, where it has one, is a link of the run's."""
    from opentelemetry.sdk.trace import TracerProvider

    name = system.publish(here, traced(write_skill("- {id: only}", "    def only(ctx): return {}\n")))
    system.start_worker(**environ(receiver))
    client = stepfast.Client(system.database_url, system.broker_url)
    with TracerProvider(shutdown_on_exit=False).get_tracer("shop").start_as_current_span("checkout") as span:
        linked = client.enqueue(name, {}).id
    alone = client.enqueue(name, {}).id
    context = span.get_span_context()
    assert whole(receiver, linked).links == ((f"{context.trace_id:032x}", f"{context.span_id:016x}"),)
    assert whole(receiver, alone).links == ()


def test_a_host_without_opentelemetry_imports_none_of_it():
    """The client looks for a span only where the host has loaded OpenTelemetry."""
    code = (
        "import sys, stepfast.client as c; assert c._traceparent() is None; assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_step_in_a_process_of_its_own_is_traced(system, here, receiver, write_skill, tmp_path):
    """A step under which workers died runs alone: the spans of that process arrive, too."""
    handlers = """
        import os, pathlib, signal
        def only(ctx):
            file = pathlib.Path(ctx.run.input["file"])
            with file.open("a") as stream:
                stream.write("x")
            if len(file.read_text()) < 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return {}
    """
    folder = write_skill("- {id: only, idempotent: true}", handlers)
    name = system.publish(here, traced(folder))
    _end_truce(system)
    for _ in range(3):
        system.start_worker(concurrency=1, **environ(receiver))
    run_id = operations.start(here, name, {"file": str(tmp_path / "tries")}).run_id
    assert system.ended(run_id)["state"] == "completed"
    whole(receiver, run_id)
    assert len(system.logged("step.alone")) == 1
    attempts = [receiver.one(run_id, f"only attempt {number}") for number in (1, 2, 3)]
    assert [span.is_error for span in attempts] == [True, True, False]
    assert receiver.tree(run_id)["only attempt 3"] == ["commit", "handlers:only"]


def test_secrets_leave_with_no_span(system, here, receiver, write_skill):
    """By their looks and names too, wherever a span carries text: inputs, outputs, errors, labels."""
    secret = "sk-ant-api03-AAAAAAAAAAAAAAAAAAAAAAAA"
    handlers = """
        def first(ctx): return {"note": ctx.run.input["note"], "password": "hunter2-correct"}
        def second(ctx): raise ValueError("cannot use " + ctx.run.input["note"])
    """
    agents = "- {id: first}\n- {id: second, depends_on: [first], retry_policy: {max_attempts: 1}}"
    name = system.publish(here, traced(write_skill(agents, handlers)))
    system.start_worker(**environ(receiver))
    run_id = operations.start(here, name, {"note": f"key {secret}"}, labels={"token": "hunter2-correct"}).run_id
    whole(receiver, run_id)
    eventually(lambda: len(receiver.of(run_id)) == 8, what="all spans")
    told = repr(receiver.spans)
    assert "cannot use key [redacted]" in told
    assert not [text for text in (secret, "hunter2-correct") if text in told]


def test_each_generation_of_a_step_is_a_span_of_its_own(system, here, receiver, write_skill):
    """A gate that refuses sends work back: the step that refused and the one done again end, and begin anew."""
    agents = """
        - {id: coder, output_schema: rated, idempotent: true}
        - {id: reviewer, depends_on: [coder], gate: "{{coder.score}} > 1", on_refused: {rerun: coder, max_rounds: 2}}
    """
    handlers = """
        def coder(ctx): return {"score": ctx.run.generation}
        def reviewer(ctx): return {}
    """
    schema = '{"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"]}'
    name = system.publish(here, traced(write_skill(agents, handlers, files={"schemas/rated.json": schema})))
    system.start_worker(**environ(receiver))
    run_id = operations.start(here, name, {}).run_id
    root = whole(receiver, run_id)
    eventually(lambda: len(receiver.of(run_id)) == 17, what="all spans")
    steps = sorted(
        (span.name, span.attributes["stepfast.generation"], span.status, span.parent)
        for span in receiver.of(run_id)
        if "stepfast.attempts" in span.attributes
    )
    refused = "gate_refused: The gate {{coder.score}} > 1 does not hold: coder.score = 1."
    assert steps == [
        ("coder", 1, "", root.id),
        ("coder", 2, "", root.id),
        ("reviewer", 1, refused, root.id),
        ("reviewer", 2, "", root.id),
    ]
    gates = [span.attributes["stepfast.gate.held"] for span in receiver.of(run_id) if span.name == "gate"]
    assert sorted(gates) == [False, True]
