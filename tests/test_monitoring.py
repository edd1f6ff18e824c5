"""docs/monitoring: the dashboard and the alert rules name metrics that exist, and say what they mean to."""

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml
from conftest import ROOT

from app.flower.metrics import _counts, _gauges
from app.runs.metrics import Total

if TYPE_CHECKING:
    from prometheus_client.core import Metric

FOLDER = ROOT / "docs" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]


def _told() -> dict[str, set[str]]:
    """The labels of each series that Flower can tell."""
    standing = {("runs", "failed"): 1.0, ("steps", "sent"): 1.0, ("letters", "x"): 1.0}
    standing |= {("approvals", ""): 0.0, ("workers", ""): 1.0}
    names = (
        "runs_ended",
        "retries",
        "rescues",
        "dead_letters",
        "tokens_input",
        "step_seconds_sum",
        "step_seconds_le_1",
    )
    totals = [Total(name, "p", "a", "l", 1.0) for name in names]
    families: list[Metric] = [*_gauges(standing, 0.0, 0), *_counts(totals)]
    told = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    return told | {"stepfast_up": set()}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_name_series_that_exist(expression):
    """Each metric and each label of a rule or a panel is one of ours."""
    told = _told()
    names = re.findall(r"stepfast_\w+", expression)
    assert names
    assert set(names) <= told.keys()
    labels = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    assert labels <= set().union(*(told[name] for name in names)) | {"le"}


def test_alerts_cover_what_asks_for_a_person():
    """A dead letter, a stuck run, no worker, the age of a queue; each says what happened and what to do."""
    assert {"StepfastDeadLetter", "StepfastRunStuck", "StepfastNoWorker", "StepfastQueueAge"} <= {
        rule["alert"] for rule in RULES
    }
    assert all(rule["annotations"].keys() == {"summary", "action"} and rule["for"] for rule in RULES)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian's prometheus)")
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]])
def test_prometheus_accepts_the_rules(command):
    """Its own tool reads them, and each fires when it should."""
    done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap():
    """Every cell of the dashboard's grid belongs to at most one panel."""
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
