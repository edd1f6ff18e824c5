"""Flower's pages in a real browser: what a person sees, follows and does. Real workers do the work."""

import os
import re

import pytest
from flowering import flower
from pipelines import agent, pipeline

from app import operations
from app.pipelines.model import RetryPolicy

CHROMIUM = "/usr/bin/chromium"
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not os.access(CHROMIUM, os.X_OK):
    pytest.skip(f"{CHROMIUM} is not installed (Debian's chromium)", allow_module_level=True)

SCRIPT = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"
HANDLERS = f"""
    import pathlib
    import time

    SCRIPT = {SCRIPT!r}

    def research(ctx):
        gate = pathlib.Path(ctx.run.input["folder"]) / "go"
        while not gate.exists():
            time.sleep(0.05)
        return {{"note": SCRIPT, "score": 0.9}}

    def publish(ctx):
        return {{"published": True}}

    def fragile(ctx):
        if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
            raise ValueError(SCRIPT)
        return {{}}
"""
ARTICLE = pipeline(
    agent("research", handler="handlers:research", queue="handlers", idempotent=True),
    agent(
        "publish",
        "research",
        handler="handlers:publish",
        queue="handlers",
        idempotent=True,
        gate="{{research.score}} >= 0.5",
        requires_human_approval=True,
    ),
    name="article",
)
FRAGILE = pipeline(
    agent(
        "fragile",
        handler="handlers:fragile",
        queue="handlers",
        idempotent=True,
        retry_policy=RetryPolicy(max_attempts=2, initial_ms=1),
    ),
    name="fragile",
)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A tab in which whatever our pages' own policy forbids, and every error of a script, fails the test."""
    context = chromium.new_context()
    context.set_default_timeout(20_000)
    tab = context.new_page()
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    yield tab
    context.close()
    # What a test does on purpose: Flower is away for a while, or refuses a write.
    expected = ("ERR_CONNECTION_REFUSED", "403 (Forbidden)")
    assert [text for text in complaints if not any(part in text for part in expected)] == []


@pytest.fixture
def work(system, here, write_skill, tmp_path):
    """Both pipelines published, a worker that executes them, and a folder whose files let them go on."""
    for definition in (ARTICLE, FRAGILE):
        write_skill("- {id: unused}", HANDLERS, name=definition.name)
        operations.publish(here, definition)
    system.environ["STEPFAST_SKILLS"] = os.pathsep.join(
        str(tmp_path / "skills" / name) for name in ("article", "fragile")
    )
    system.start_worker(queues="handlers")
    return tmp_path


def _start(here, name: str, folder) -> str:
    return str(operations.start(here, name, {"folder": str(folder)}).run_id)


def _is(page, agent: str, state: str):
    page.wait_for_selector(f"#node-{agent}[data-state={state}]")


def test_a_run_is_found_followed_and_approved(system, here, work, page):
    """From the list to its end, without a reload: a person sees each step change, looks, approves, and it goes on."""
    with flower(system.environ) as url:
        run = _start(here, "article", work)
        _start(here, "fragile", work)
        page.goto(f"{url}/")
        page.get_by_role("link", name="Runs").click()
        assert page.locator("#runs-table tbody tr").count() == 2
        page.get_by_label("Pipeline").fill("article")
        page.get_by_role("button", name="Filter").click()
        page.get_by_role("link", name=run[:8]).click()
        assert page.url == f"{url}/run/{run}"
        _is(page, "research", "executing")
        page.evaluate("window.neverReloaded = true")
        (work / "go").touch()
        _is(page, "research", "completed")
        _is(page, "publish", "suspended")
        assert page.evaluate("window.neverReloaded")

        # What the agent wrote is shown, as text.
        page.locator("#output-research summary").click()
        assert SCRIPT in page.locator("#output-research pre").inner_text()
        assert page.evaluate("window.hacked") is None
        assert page.locator("#live img, #live script").count() == 0
        assert "research.score = 0.9" in page.locator(".sf-gate-saw").last.text_content()

        page.get_by_role("link", name="Look and approve").click()
        assert SCRIPT in page.locator("pre").last.inner_text()
        assert "research.score" in page.locator("dl").inner_text()
        page.get_by_label("Reason").fill("It reads well.")
        page.get_by_role("button", name="Approve").click()
        assert page.url == f"{url}/run/{run}"
        _is(page, "publish", "completed")
        page.wait_for_selector("#live[data-ended]")
        assert page.locator("#run-state").inner_text() == "completed"
        assert (
            "approved by somebody at Flower, without a login: It reads well." in page.locator("#timeline").inner_text()
        )


def test_a_dead_letter_is_opened_and_resumed(system, here, work, page):
    """From the group to the letter, to the plan, to a run that completes; what its error said is text, too."""
    runs = [_start(here, "fragile", work) for _ in range(2)]
    for run in runs:
        system.ended(run)
    (work / "mended").touch()
    with flower(system.environ) as url:
        page.goto(f"{url}/dead-letters")
        assert page.locator("#letters-table tbody tr").count() == 1
        assert page.locator(".sf-count").inner_text() == "2"
        assert SCRIPT in page.locator("#letters-table").inner_text()
        page.get_by_role("link", name="List").click()
        assert page.locator("#letters-table tbody tr").count() == 2
        page.get_by_role("link", name="Open").first.click()
        assert "handler_failed" in page.locator(".detail-card").first.inner_text()
        page.get_by_role("link", name="Resume its run").click()
        assert "it was discarded" in page.locator("table").inner_text()
        page.get_by_role("button", name="Resume").click()
        resumed = re.fullmatch(rf"{url}/run/(.*)", page.url)[1]
        page.wait_for_selector("#live[data-state=completed]")
        assert page.evaluate("window.hacked") is None
        assert system.run(resumed)["state"] == "completed"

        page.goto(f"{url}/dead-letters")
        page.get_by_role("link", name="Open newest").click()
        page.get_by_role("link", name="Discard").click()
        page.get_by_role("button", name="Discard").click()
        assert "There is no dead letter." in page.locator("#letters-table").inner_text()


def test_a_page_goes_on_after_flowers_restart(system, here, work, page, chromium):
    """State is in Postgres: the open page follows on by itself; a plan without its token does nothing."""
    run = _start(here, "article", work)
    with flower(system.environ) as url:
        page.goto(f"{url}/run/{run}")
        _is(page, "research", "executing")
        page.get_by_text("Live", exact=True).wait_for()
    page.get_by_text("No answer, trying again").wait_for()
    (work / "go").touch()
    with flower(system.environ, f"--port={url.rpartition(':')[2]}"):
        _is(page, "publish", "suspended")
        page.get_by_role("link", name="Cancel").click()
        page.evaluate("document.querySelector('input[name=_xsrf]').remove()")
        page.get_by_role("button", name="Cancel the run").click()
        assert "_xsrf" in page.locator("#problem").inner_text()
        assert system.run(run)["state"] == "suspended"
        page.goto(f"{url}/run/{run}/cancel")
        page.get_by_role("button", name="Cancel the run").click()
        page.wait_for_selector("#live[data-state=cancelled]")
