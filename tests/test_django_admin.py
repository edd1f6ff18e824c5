"""The admin: what it shows in a real browser, what it asks before it orders, and who may."""

import djangohost
import pytest
import stepfast
from browsing import browser_page, needs_browser, picture
from conftest import eventually
from djangohost import PASSWORD, Host
from hosting import fetch

TAG = "<script>document.title = 'owned'</script>"
AGENTS = """
    - {id: write, retry_policy: {max_attempts: 1}}
    - {id: pay, depends_on: [write], requires_human_approval: true}
"""
HANDLERS = f"""
    import pathlib

    def write(ctx):
        if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
            raise ValueError("{TAG} and the disk is on fire")
        return {{"text": "{TAG}"}}

    def pay(ctx):
        return {{}}
"""


@pytest.fixture(scope="module")
def _django_template(servers, _template):
    with djangohost.template(servers, _template) as made:
        yield made


@pytest.fixture
def database_template(_django_template):
    return _django_template


@pytest.fixture
def host(system):
    return Host(djangohost.environment(system.database_url, system.broker_url))


@pytest.fixture
def client(system, here, write_skill, database_url, broker_url):
    system.publish(here, write_skill(AGENTS, HANDLERS))
    system.start_worker(queues="handlers")
    return stepfast.Client(database_url, broker_url)


def _sign_in(page, address):
    page.goto(f"{address}/admin/login/?next=/admin/stepfast/run/")
    page.fill("#id_username", "admin")
    page.fill("#id_password", PASSWORD)
    page.click("[type=submit]")
    page.wait_for_url(f"{address}/admin/stepfast/run/")


def _confirm(page, button: str, *, reason: str = "") -> str:
    """Presses an order's button, and what confirms it. Returns what the page of the confirmation said."""
    page.click(f"button[value={button}]")
    page.wait_for_selector("text=Yes, I am sure")
    picture(page, f"confirm-{button}.png")
    said = page.inner_text("#content")
    page.fill("#reason", reason)
    page.click("text=Yes, I am sure")
    page.wait_for_selector(".messagelist")
    return said


@needs_browser
def test_failed_run_is_found_resumed_and_approved_in_a_browser(system, host, client, tmp_path):
    """List, filter, search, open; a dead letter's text is shown as text; each order is confirmed, and carried out."""
    run = client.enqueue("tested", {"folder": str(tmp_path)}, key="mine")
    system.ended(run.id)
    other = client.enqueue("tested", {"folder": str(tmp_path)}, key="other")
    with host.served() as address, browser_page() as page:
        _sign_in(page, address)
        page.click("#changelist-filter >> text=failed")
        page.wait_for_url("**state=failed**")
        page.fill("#searchbar", "mine")
        page.click("#changelist-search [type=submit]")
        page.wait_for_url("**q=mine**")
        page.wait_for_selector("text=1 run")
        assert page.locator("#result_list tbody tr").count() == 1
        page.click("#result_list tbody th a")
        page.wait_for_selector("text=Dead letters")
        assert page.title() != "owned"
        assert f"ValueError: {TAG}" in page.inner_text("#content")

        (tmp_path / "mended").touch()
        assert "tested" in _confirm(page, "resume", reason="mended")
        assert "1 of 1: done." in page.inner_text(".messagelist")
        eventually(lambda: run.status().asks, what="the question")

        page.goto(f"{address}/admin/stepfast/run/{run.id}/change/")
        said = _confirm(page, "approve")
        assert (TAG in said, page.title() != "owned") == (True, True)
        system.ended(run.id)
        page.goto(f"{address}/admin/stepfast/run/{run.id}/change/")
        assert "run.completed" in page.inner_text("#content")
        assert page.locator("button[value=cancel]").count() == 0

        system.ended(other.id)
        page.goto(f"{address}/admin/stepfast/deadletter/?resolved_at__isempty=1")
        page.check("#action-toggle")
        page.select_option("[name=action]", "resume")
        page.click("button[name=index]")
        page.click("text=Yes, I am sure")
        page.wait_for_selector(".messagelist")
        eventually(lambda: other.status().asks, what="the other's question")
        for name in ("step", "attempt"):
            page.goto(f"{address}/admin/stepfast/{name}/")
            assert page.locator("#result_list tbody tr").count() >= 3


PERMISSIONS = """
    from django.contrib.auth import get_user_model
    from django.contrib.auth.models import Permission
    from django.test import Client
    from stepfast.django.models import Run

    pk = str(Run.objects.get().pk)
    users = get_user_model().objects
    for name, codes in (("nobody", ()), ("viewer", ("view_run",)), ("operator", ("view_run", "approve_run", "cancel_run"))):
        user = users.create_user(name, password="x", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=codes))

    def client(name, **more):
        made = Client(SERVER_NAME="localhost", **more)
        made.force_login(users.get(username=name))
        return made

    def order(name, action, **more):
        given = {"action": action, "_selected_action": pk, **more}
        return client(name).post("/admin/stepfast/run/", given, follow=True).content.decode()

    def asked():
        from stepfast.django.databases import DjangoDatabase
        return DjangoDatabase("default").read("select action, requested_by, state from stepfast.v_requests order by requested_at")

    page = f"/admin/stepfast/run/{pk}/change/"
    assert client("nobody").get("/admin/stepfast/run/").status_code == 403
    assert client("nobody").get(page).status_code == 403
    shown = client("viewer").get(page).content.decode()
    assert "<h2>Steps</h2>" in shown
    assert 'name="action"' not in shown
    assert '<button class="button" name="action" value="cancel">' in client("operator").get(page).content.decode()
    for name, action in (("viewer", "cancel"), ("operator", "resume"), ("nobody", "approve")):
        order(name, action, confirmed="yes")
    assert asked() == []
    # The first post only asks.
    assert "Yes, I am sure" in order("operator", "approve")
    assert asked() == []
    # Nothing is approved that was not shown.
    order("operator", "approve", confirmed="yes", digest="of something else")
    assert asked() == []
    # A write without its token is refused.
    strict = client("operator", enforce_csrf_checks=True)
    assert strict.post("/admin/stepfast/run/", {"action": "cancel", "_selected_action": pk, "confirmed": "yes"}).status_code == 403
    assert asked() == []
    assert "1 of 1: done." in order("operator", "cancel", confirmed="yes")
    assert asked() == [("cancel", "operator", "done")]
    assert "does not allow it" in order("operator", "cancel", confirmed="yes")
    assert client("operator").get("/admin/stepfast/run/add/").status_code == 403
    print("good")
"""


def test_orders_need_permission_confirmation_and_token(host, client, tmp_path, database_url):
    """Who may look may not order; who may cancel may not resume; and the first post of anything only asks."""
    (tmp_path / "mended").touch()
    run = client.enqueue("tested", {"folder": str(tmp_path)})
    eventually(lambda: run.status().asks, what="the question")
    assert host.script(PERMISSIONS) == "good\n"
    assert fetch(database_url, "select state from stepfast.runs") == [("cancelled",)]
