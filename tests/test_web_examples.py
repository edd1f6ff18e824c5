"""examples/django_shop and examples/flask_desk, as a newcomer starts them, in a real browser."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from browsing import browser_page, needs_browser, picture
from conftest import ROOT

pytestmark = [pytest.mark.slow, needs_browser]
TAG = "<script>document.title = 'owned'</script>"


@contextmanager
def started(name: str, home: Path):
    """An example, and a function that reads its output until a line matches; Ctrl-C must end all of it, in order."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("STEPFAST_", "ANTHROPIC_"))}
    running = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "start.py", name],
        cwd=home,
        env=environ | {"STEPFAST_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = []

    def until(pattern: str) -> re.Match:
        for line in running.stdout:
            seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(seen))

    try:
        yield until
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=60)
        assert (running.returncode, rest.splitlines()[-1]) == (0, "Stopped."), rest
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def test_shop_ships_what_a_person_approved(tmp_path):
    """An order and its run in one transaction, followed live; only staff may ship it; the agent uses the shop's models."""
    with started("django_shop", tmp_path) as until, browser_page() as page:
        address, password = until(r"Open (http://127\.0\.0\.1:\d+)/ .* password (\S+)").groups()
        page.goto(address)
        page.fill("[name=customer]", "Ann")
        item = "tea" if os.environ.get("PICTURES") else TAG
        page.fill("[name=item]", item)
        page.fill("[name=quantity]", "2")
        page.click("text=Order")
        page.wait_for_selector("text=somebody must look at this")
        assert item in page.inner_text("#shown")
        assert page.locator("text=Ship it").count() == 0
        ordered = page.url
        page.click("text=Sign in to decide")
        page.fill("#id_username", "admin")
        page.fill("#id_password", password)
        page.click("[type=submit]")
        page.wait_for_url(ordered)
        page.wait_for_selector("text=Ship it")
        picture(page, "shop.png")
        page.goto(f"{address}/admin/stepfast/run/")
        page.click("#result_list tbody th a")
        page.wait_for_selector("text=Waits for a person")
        assert page.locator("button[name=action]").count() == 3
        picture(page, "admin-run.png")
        page.goto(ordered)
        page.click("text=Ship it")
        page.wait_for_selector("#run:text('completed')")
        assert page.inner_text("#order") == "shipped"
        page.goto(f"{address}/")
        assert "A small order of a common item." in page.inner_text("body")
        assert page.title() != "owned"


def test_desk_sends_what_a_person_read(tmp_path):
    """A ticket and its run in one transaction, followed live; what is sent is what was shown; no other site may press it."""
    with started("flask_desk", tmp_path) as until, browser_page() as page:
        address = until(r"Open (http://127\.0\.0\.1:\d+)/")[1]
        page.goto(address)
        page.fill("[name=subject]", TAG)
        page.fill("[name=body]", "It does not open.")
        page.click("button")
        page.wait_for_selector("text=somebody must read it")
        draft = page.inner_text("#shown")
        ticket = page.url
        assert page.request.post(f"{ticket}/send", form={"digest": page.input_value("#digest")}).status == 403
        page.click("text=Send this answer")
        page.wait_for_selector("#run:text('completed')")
        assert (page.inner_text("#ticket"), page.inner_text("#answer")) == ("answered", draft)
        assert page.title() != "owned"
