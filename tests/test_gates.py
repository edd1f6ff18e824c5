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
    """Runs a reviewer behind a gate, and gives its step."""

    def run(gate: str, age: int):
        agents = (
            f'- {{id: patient, output_schema: patient}}\n- {{id: reviewer, depends_on: [patient], gate: "{gate}"}}\n'
        )
        folder = write_skill(agents, HANDLERS, files={"schemas/patient.json": json.dumps(SCHEMA)})
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
