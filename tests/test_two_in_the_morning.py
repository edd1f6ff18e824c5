"""The ten questions of docs/two-in-the-morning.md, of a night on real parts: each is answered by its one command."""

import re
from pathlib import Path

import commanding
import psycopg
import pytest
from nights import SECRET, SUMMARY, coded, night, researched

from app import operations

DOCUMENT = Path(__file__).parent.parent / "docs" / "two-in-the-morning.md"


def _minutes_pass(system) -> None:
    with psycopg.connect(system.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("update stepfast.meta set clock_offset = clock_offset + interval '2 minutes'")


class Asked:
    """The document's commands, by question; what they are asked of replaces RUN."""

    def __init__(self, capsys) -> None:
        self._cli = commanding.in_process(capsys)
        rows = re.findall(r"^\| (.+\?) \| `stepfast (.+)` \|$", DOCUMENT.read_text(), re.MULTILINE)
        self.left = dict(rows)
        assert len(self.left) == 10

    def __call__(self, question: str, *runs: object, data: bool = False):
        words = self.left.pop(question).replace("NAME", "night").split()
        given = iter(map(str, runs))
        words = [next(given) if word == "RUN" else word for word in words]
        said = self._cli(*words, *(["--json"] if data else []))
        assert said.code == 0, said
        assert SECRET not in said.out + said.err
        return said.json if data else said.out


@pytest.mark.slow
def test_each_question_has_its_command(system, monkeypatch, write_skill, capsys):
    """A paid answer that did not fit, a worker that was killed, an approval; the next night a gate that refused."""
    ask = Asked(capsys)
    with night(system, monkeypatch, write_skill) as here:
        first, dead = here.eventful()
        _minutes_pass(system)
        stuck = ask("Which runs are stuck, since when?")
        assert str(first)[:8] in stuck
        assert "suspended" in stuck
        assert "deployer waits for a person since 20" in stuck

        operations.decide(here.here, first, "deployer", approved=True, by="ann", reason="looks right")
        system.ended(first)
        # The next night: another prompt, and a coder that is not sure.
        file = here.folder / "prompts" / "coder.md"
        file.write_text(file.read_text().replace("Repair it:", "Repair it at once:"))
        skill = here.folder / "night.skill.yaml"
        skill.write_text(skill.read_text().replace("1.0.0", "1.1.0"))
        system.publish(here.here, here.folder)
        here.answers(researched(), coded(0.4))
        second = here.start()
        assert system.ended(second)["state"] == "failed"

        failed = ask("What failed, and why?", second)
        assert "reviewer was given up after 1 attempt (gate_refused)" in failed
        assert "coder.confidence = 0.4" in failed

        seen = ask("What did the coder see?", second)
        assert "You write code." in seen
        assert f"Repair it at once: {SUMMARY}" in re.sub(r"</?data-[^>]+>", "", seen)
        assert '"confidence": 0.4' in seen or "confidence: 0.4" in seen

        drawn = ask("Did anything run twice?", first)
        assert "coder was executed 2 times (worker_lost); one was committed." in drawn
        assert "researcher was executed 2 times (invalid_output); one was committed." in drawn
        assert "deployer was executed" not in drawn

        assert f":{dead} " in ask("Which worker died?")
        spent = ask("What did it cost, and what was wasted?", data=True)
        _cost_adds_up(spent, [system.run(run) for run in (first, second)])

        refused = ask("Why was the gate refused?", second)
        assert "{{coder.confidence}} >= 0.85 refused: coder.confidence = 0.4" in refused

        approved = ask("What did the approver approve?", first)
        assert re.search(r"approved by ann at 20.* UTC \(looks right\): digest [0-9a-f]{12}", approved)
        assert "outputs.coder.confidence: 0.9" in approved
        assert "input.place: production" in approved

        plan = ask("What will a resume do?", second)
        assert re.search(r"^coder +reuse +completed", plan, re.MULTILINE)
        assert re.search(r"^reviewer +re-run .*its gate would refuse the same values", plan, re.MULTILINE)

        changed = ask("What changed between yesterday's run and today's?", first, second)
        for said in (
            "run: version\n  - 1.0.0\n  + 1.1.0",
            "-user: Repair it: {{researcher.summary}}",
            "coder: output",
            "-confidence: 0.9",
            "reviewer: gate saw",
            "+verdict: refused",
            "completed -> discarded",
        ):
            assert said in re.sub(r"^  ([-+])(?=\w)", r"\1", changed, flags=re.MULTILINE), changed
    assert ask.left == {}


def _cost_adds_up(spent, runs):
    """All that was paid for, and of that the answer that did not fit; the call that was lost is only guessed."""
    tries = [entry for run in runs for step in run["steps"] for entry in step["tries"] if entry["cost_usd"]]
    assert spent["cost_usd"] == pytest.approx(sum(entry["cost_usd"] for entry in tries))
    (bad,) = [entry for entry in tries if entry["state"] == "failed"]
    assert spent["wasted_usd"] == pytest.approx(bad["cost_usd"])
    by = {entry["how"]: entry for entry in spent["wasted"]}
    assert (by["failed"]["code"], by["failed"]["calls"]) == ("invalid_output", 1)
    coders = [entry["cost_usd"] for entry in tries if entry["agent"] == "coder"]
    assert (by["lost"]["code"], by["lost"]["calls"]) == ("worker_lost", 1)
    assert by["lost"]["estimate_usd"] == pytest.approx(sum(coders) / len(coders))
    assert spent["runs"] == {"completed": 1, "failed": 1}
    assert spent["recoveries"][0]["begun_again"] == 1
    assert spent["dead_letters"][0]["code"] == "gate_refused"
