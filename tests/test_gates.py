"""Gates over values that may not be shown, with real workers."""

import json

import pytest

from app import operations

HANDLERS = """
    def patient(ctx): return {"person": {"age": ctx.run.input["age"]}, "diagnosis": "measles", "credentials": {"found": 0}}
    def reviewer(ctx): return {}
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "person": {
            "type": "object",
            "x-sensitive": True,
            "properties": {"age": {"type": "integer"}},
            "required": ["age"],
        },
        "diagnosis": {"type": "string", "x-sensitive": True},
        "credentials": {"type": "object", "properties": {"found": {"type": "integer"}}, "required": ["found"]},
    },
    "required": ["person", "diagnosis", "credentials"],
}


@pytest.fixture
def reviewed(system, here, write_skill):
    """Runs a reviewer behind a gate, and gives its step. `tracing` are the fields of its section."""

    def run(gate: str, age: int, **tracing):
        agents = (
            f'- {{id: patient, output_schema: patient}}\n- {{id: reviewer, depends_on: [patient], gate: "{gate}"}}\n'
        )
        folder = write_skill(agents, HANDLERS, files={"schemas/patient.json": json.dumps(SCHEMA)})
        if tracing:
            file = next(folder.glob("*.skill.yaml"))
            file.write_text(f"{file.read_text()}tracing: {json.dumps({'enabled': True, **tracing})}\n")
        system.start_worker()
        return system.ended(operations.start(here, system.publish(here, folder), {"age": age}).run_id)["steps"][1]

    return run


def test_gate_reads_what_lies_inside_of_what_is_hidden(reviewed):
    """The gate holds over the recorded outputs, whatever of them may be shown."""
    assert reviewed("{{patient.person.age}} >= 18 and {{patient.credentials.found}} == 0", 18)["state"] == "completed"


def test_refused_gate_hides_what_lies_inside_of_what_is_hidden(reviewed):
    """It is a refusal, and no author's mistake; what it saw is left out."""
    (attempt,) = reviewed("{{patient.person.age}} >= 18", 17)["tries"]
    assert attempt["error"]["code"] == "gate_refused"
    assert attempt["error"]["details"]["values"] == {"patient.person.age": "[redacted]"}


def test_gate_that_cannot_be_evaluated_shows_no_secret(system, reviewed):
    """An error in a gate is a failure with what it saw, as it may be shown."""
    (attempt,) = reviewed("{{patient.diagnosis}} > 3 and {{patient.person.age}} > 3", 1)["tries"]
    assert attempt["error"]["code"] == "author_mistake"
    values = {"patient.diagnosis": "[redacted]", "patient.person.age": "[redacted]"}
    assert attempt["error"]["details"]["values"] == values
    assert "measles" not in json.dumps(attempt["error"])


GATE = "{{input.age}} > 7000"


@pytest.mark.parametrize("tracing", [{}, {"log_outputs": True}])
def test_logs_show_what_a_gate_read_only_where_inputs_are_logged(system, reviewed, tracing):
    """The verdict is logged; what it was of stands in the database alone, in the refusal."""
    (attempt,) = reviewed(GATE, 6789, **tracing)["tries"]
    assert attempt["error"]["message"] == "The gate {{input.age}} > 7000 does not hold: input.age = 6789."
    assert attempt["error"]["details"]["values"] == {"input.age": 6789}
    (gate,) = system.logged("step.gate")
    assert (gate["gate"], gate["held"]) == (GATE, False)
    (discarded,) = system.logged("step.discarded")
    assert discarded["message"] == "The gate {{input.age}} > 7000 does not hold."
    assert [line for line in (gate, discarded) if "6789" in json.dumps(line)] == []


def test_logs_show_what_a_gate_read_where_the_file_says_so(system, reviewed):
    """Beside the verdict; and in the refusal, where outputs are logged too."""
    reviewed(GATE, 6789, log_inputs=True, log_outputs=True)
    assert system.logged("step.gate")[0]["values"] == {"input.age": 6789}
    assert system.logged("step.discarded")[0]["message"].endswith("input.age = 6789.")
