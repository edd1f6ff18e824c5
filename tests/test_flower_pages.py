"""Flower's pages and API as programs meet them: who may come in, what is written how, and what is shown."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
from commanding import claim, complete, give_up
from conftest import ROOT, eventually, fresh_database
from flowering import LOGIN, Visitor, flower
from pipelines import agent, pipeline

from app.flower import view
from app.flower.graph import NODE_HEIGHT_PX, layout
from app.runs.database import engine
from app.runs.store import Store

SECRET = "sk-ant-planted0123456789"
HOSTILE = "<b>bold</b> \x1b]0;owned\x07 \u202e" + SECRET
SCHEMA = {"type": "object", "properties": {"pin": {"type": "string", "x-sensitive": True}}}
LINE = pipeline(
    agent("first", schema=SCHEMA),
    agent("second", "first", requires_human_approval=True, gate="{{first.score}} >= 0.5"),
    name="shop",
)
PAGES = (
    "/runs",
    "/run/{run}",
    "/run/{run}/cancel",
    "/dead-letters",
    "/dead-letter/{letter}",
    "/dead-letter/{letter}/discard",
)
API = ("/api/runs", "/api/run/info/{run}", "/api/dead-letters", "/api/dead-letter/info/{letter}")
WRITES = ("/run/{run}/cancel", "/run/{run}/resume", "/run/{run}/approve/second", "/dead-letter/{letter}/discard")


class Shop:
    """A database with a run that waits for a person, and one that has failed."""

    def __init__(self, url: str) -> None:
        self.store = Store(engine(url, pool_max=2))
        self.store.publish(LINE)
        self.waiting = self.start({"issue": HOSTILE, "password": SECRET})
        complete(self.store, LINE, self.waiting, "first", {"text": HOSTILE, "score": 0.9, "pin": "swordfish"})
        bid = claim(self.store, LINE, self.waiting, "second")
        self.store.suspend(bid.step, bid.attempt_id, "d" * 64, {}, None)
        self.failed = self.start({"issue": "other"})
        give_up(self.store, LINE, self.failed, "first", message=HOSTILE, details={"token": SECRET, "saw": HOSTILE})
        with self.store.engine.connect() as connection:
            self.letter = connection.exec_driver_sql("select id from stepfast.dead_letters").scalar_one()

    def start(self, run_input: dict, **labels: str) -> UUID:
        return self.store.enqueue("shop", run_input, labels={"ticket": "7"} | labels)[0]

    def state(self, run: UUID) -> str:
        with self.store.engine.connect() as connection:
            return connection.exec_driver_sql(f"select state from stepfast.runs where id = '{run}'").scalar_one()

    def fill(self, path: str) -> str:
        return path.format(run=self.waiting, letter=self.letter)


@pytest.fixture(scope="module")
def environ(servers, _template):
    """Settings of a Flower; nothing runs on its broker."""
    with fresh_database(servers, _template) as url:
        yield {"STEPFAST_DATABASE_URL": url, "STEPFAST_BROKER_URL": servers.broker_url}


@pytest.fixture(scope="module")
def shop(environ):
    made = Shop(environ["STEPFAST_DATABASE_URL"])
    yield made
    made.store.engine.dispose()


@pytest.fixture(scope="module")
def locked(environ, shop):
    """A Flower with a login, under a prefix."""
    with flower(environ, f"--basic_auth={LOGIN}", "--url_prefix=ops", "--address=0.0.0.0") as url:
        yield url.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture(scope="module")
def local(environ, shop):
    """A Flower without one, where nothing may be written."""
    with flower(environ, "--read-only") as url:
        yield url


@pytest.fixture
def ann(locked):
    return Visitor(locked, LOGIN)


def test_nothing_is_seen_without_the_login(locked, shop):
    """Pages, API and buttons answer 401 to a stranger, and to a wrong password."""
    for visitor in (Visitor(locked), Visitor(locked, "ann:wrong")):
        for path in PAGES + API:
            assert visitor.get(shop.fill(path)).status == 401, path
        for path in WRITES:
            assert visitor.post(shop.fill(path), {}).status in {401, 403}, path
    assert (shop.state(shop.waiting), shop.state(shop.failed)) == ("suspended", "failed")


def test_the_api_is_closed_where_there_is_no_login(local, environ, shop):
    """As Flower's own: 401, unless FLOWER_UNAUTHENTICATED_API opens it, and then no other site may read it."""
    for path in API:
        assert Visitor(local).get(shop.fill(path)).status == 401, path
    with flower(environ | {"FLOWER_UNAUTHENTICATED_API": "1"}) as url:
        for path in API + PAGES:
            answer = Visitor(url).get(shop.fill(path))
            assert answer.status == 200, path
            assert "Access-Control-Allow-Origin" not in answer.headers


def test_without_a_login_only_this_machines_names_are_answered(local, shop):
    """A site that gives its name our address would be same-origin with us: its requests are refused."""
    for path in PAGES:
        assert Visitor(local).get(shop.fill(path), Host="evil.example").status == 403, path
        assert Visitor(local).get(shop.fill(path), Host="localhost:5555").status == 200, path


@pytest.mark.parametrize("path", WRITES)
def test_a_write_without_its_token_is_refused(ann, shop, path):
    """Also with the right password, which a browser sends by itself; also with a token that is not of the cookie."""
    assert ann.post(shop.fill(path), {"digest": "d" * 64}).status == 403
    ann.get("/runs")
    assert ann.token
    assert ann.post(shop.fill(path), {"digest": "d" * 64}).status == 403
    assert ann.post(shop.fill(path), {"digest": "d" * 64, "_xsrf": "2|00|00|00"}).status == 403
    foreign = ann.post(shop.fill(path), {"_xsrf": ann.token}, Origin="http://evil.example")
    assert foreign.status == 403
    assert (shop.state(shop.waiting), shop.state(shop.failed)) == ("suspended", "failed")


def test_read_only_hides_the_buttons_and_refuses_the_writes(local, shop):
    """A write with its token is refused, and nothing offers one."""
    visitor = Visitor(local)
    page = visitor.get(shop.fill("/run/{run}")).text
    assert "/approve/" not in page
    assert 'id="cancel"' not in page
    assert 'id="discard"' not in visitor.get(shop.fill("/dead-letter/{letter}")).text
    for path in WRITES:
        refused = visitor.post(shop.fill(path), {"_xsrf": visitor.token, "digest": "d" * 64})
        assert (refused.status, "--read-only" in refused.text) == (403, True), path
    assert (shop.state(shop.waiting), shop.state(shop.failed)) == ("suspended", "failed")


def test_who_acted_is_recorded_and_what_was_not_seen_is_not_approved(ann, shop):
    """The login's name stands in the record; a digest other than the one asked for is refused in a sentence."""
    run = shop.start({"issue": "x"})
    complete(shop.store, LINE, run, "first", {"score": 0.9})
    bid = claim(shop.store, LINE, run, "second")
    shop.store.suspend(bid.step, bid.attempt_id, "e" * 64, {}, None)
    seen = ann.get(f"/run/{run}/approve/second").text
    assert f'value="{"e" * 64}"' in seen
    other = ann.post(f"/run/{run}/approve/second", {"_xsrf": ann.token, "digest": "f" * 64})
    assert (other.status, "Nothing of second waits for this decision" in other.text) == (409, True)
    done = ann.post(f"/run/{run}/reject/second", {"_xsrf": ann.token, "digest": "e" * 64, "reason": "no\x00no"})
    assert (done.status, done.headers["Location"]) == (303, f"/ops/run/{run}")
    decided = ann.get(f"/api/run/info/{run}").json["approvals"][-1]
    assert (decided["state"], decided["decided_by"], decided["reason"]) == ("rejected", "ann", "no no")
    again = ann.get(f"/run/{run}/approve/second")
    assert (again.status, "It was rejected by ann" in again.text) == (409, True)


def test_what_agents_wrote_is_text_and_secrets_are_hidden(ann, shop):
    """On every page and in the API: no tag, no control character, no secret by its looks, its name or its schema."""
    for path in (*PAGES, "/run/{run}/approve/second", *API):
        answer = ann.get(shop.fill(path))
        assert answer.status == 200, path
        assert "planted" not in answer.text, path
        assert "swordfish" not in answer.text, path
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", answer.text), path
        if path not in API:
            assert "<b>" not in answer.text, path
            assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "&lt;b&gt;bold&lt;/b&gt;" in ann.get(shop.fill("/run/{run}")).text
    templates = (ROOT / "app" / "flower" / "templates").glob("*.html")
    assert [path.name for path in templates if re.search(r"\{%\s*(raw|autoescape)\b", path.read_text())] == []


def test_runs_are_filtered_and_paged(ann, shop):
    """By state, pipeline, label and age; a page begins below the one before it, whatever is new."""
    mine = [str(shop.start({}, batch="mine")) for _ in range(5)]
    first = ann.get("/api/runs?label=batch%3Dmine&limit=2").json
    shop.start({}, batch="mine")
    second = ann.get(f"/api/runs?label=batch%3Dmine&limit=2&before={first['older']}").json
    third = ann.get(f"/api/runs?label=batch%3Dmine&limit=2&before={second['older']}").json
    assert [run["id"] for page in (first, second, third) for run in page["runs"]] == mine[::-1]
    assert third["older"] is None
    assert [run["id"] for run in ann.get("/api/runs?state=suspended").json["runs"]] == [str(shop.waiting)]
    assert ann.get("/api/runs?pipeline=other").json == {"runs": [], "older": None}
    assert ann.get("/api/runs?since=2999-01-01").json["runs"] == []
    assert ann.get("/api/runs?since=1h").json["runs"] != []
    assert "There is no such run." in ann.get("/runs?label=batch%3Dyours").text
    for query in ("state=odd", "label=odd", "since=odd", "before=odd", "limit=0", "limit=x"):
        assert ann.get(f"/api/runs?{query}").status == 400, query


def test_a_page_of_many_runs_leads_to_the_older_ones(ann, shop):
    """Fifty a page, with a link that keeps the filter."""
    for _ in range(51):
        shop.start({}, batch="many")
    page = ann.get("/runs?label=batch%3Dmany").text
    assert page.count("<code>") == 50
    older = re.search(r'rel="next" href="/ops(.*?)"', page)[1].replace("&amp;", "&")
    assert ann.get(older).text.count("<code>") == 1


def test_what_does_not_exist_is_not_found(ann):
    """A sentence and 404, on pages and in the API."""
    for path in (f"/run/{uuid4()}", f"/dead-letter/{uuid4()}", f"/run/{uuid4()}/resume", f"/run/{uuid4()}/cancel"):
        assert (ann.get(path).status, "There is no" in ann.get(path).text) == (404, True), path
    assert ann.get(f"/api/run/info/{uuid4()}").text.startswith("There is no run")
    assert ann.get("/run/not-an-id").status == 404


def test_a_follower_is_told_only_what_is_new(ann, shop):
    """Who has seen all events gets 204, at the price of one row."""
    page = ann.get(f"/run/{shop.waiting}").text
    seq = int(re.search(r'data-seq="(\d+)"', page)[1])
    assert ann.get(f"/run/{shop.waiting}?seen={seq}").status == 204
    assert ann.get(f"/run/{shop.waiting}?seen={seq - 1}").status == 200


def test_the_apis_run_is_that_of_the_command_line(ann, shop):
    """The same keys, with the events; a large value is cut to its beginning."""
    run = shop.start({"long": "y" * 200_000})
    found = ann.get(f"/api/run/info/{run}").json
    assert {"id", "steps", "totals", "approvals", "events"} <= found.keys()
    assert len(json.dumps(found["input"])) <= 65_536
    assert [event["name"] for event in found["events"]] == ["run.enqueued"]


def test_a_letter_is_discarded_once(ann, shop):
    """It is closed by its login's name; a second discard is told so."""
    run = shop.start({"issue": "y"})
    give_up(shop.store, LINE, run, "first", message="quite another error")
    group = next(entry for entry in ann.get("/api/dead-letters").json["groups"] if entry["run_id"] == str(run))
    listed = ann.get(f"/api/dead-letters?fingerprint={group['error_fingerprint']}").json
    assert [entry["run_id"] for entry in listed["letters"]] == [str(run)]
    ann.get("/runs")
    path = f"/dead-letter/{group['example']}/discard"
    assert ann.post(path, {"_xsrf": ann.token}).status == 303
    assert ann.post(path, {"_xsrf": ann.token}).status == 409
    assert ann.get(path).status == 409
    closed = ann.get(f"/api/dead-letter/info/{group['example']}").json
    assert (closed["resolution"], closed["resolved_by"]) == ("discarded", "ann")


def test_flowers_own_pages_have_our_entries(ann, locked):
    """Its menu leads to ours, under its prefix; our files are served beside its own."""
    page = ann.get("/workers").text
    assert '<a class="nav-link" href="/ops/runs"' in page
    assert 'href="/ops/dead-letters"' in page
    for path in re.findall(r'(?:href|src)="/ops(/stepfast/[^"]+)"', ann.get("/runs").text):
        assert ann.get(path).status == 200


def test_a_database_that_is_away_is_a_sentence(environ, shop):
    """No traceback, and Flower's own pages go on."""
    with flower(environ | {"STEPFAST_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}) as url:
        answer = Visitor(url).get("/runs")
        assert (answer.status, "Postgres cannot be used" in answer.text) == (503, True)
        assert Visitor(url).get("/workers").status == 200


def test_a_slow_database_holds_up_nothing_else(environ, shop):
    """While Postgres makes all wait, Flower's loop goes on, and who comes when many wait is told so at once."""
    with flower(environ) as url, shop.store.engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin() as held, ThreadPoolExecutor(30) as pool:
            connection.exec_driver_sql("lock table stepfast.runs in access exclusive mode")
            asked = [pool.submit(Visitor(url).get, "/runs") for _ in range(30)]
            eventually(lambda: sum(one.done() for one in asked) >= 10, within_s=4, what="those who are turned away")
            assert Visitor(url).get("/healthcheck").status == 200
            assert sum(one.done() for one in asked) == 10
            held.rollback()
            statuses = Counter(one.result().status for one in asked)
    assert statuses[503] >= 10
    assert statuses.keys() <= {200, 503}


def test_a_gate_that_could_not_be_evaluated_did_not_hold(shop, ann):
    """The page of a run says so, at the agent and at its attempt."""
    run = shop.start({})
    complete(shop.store, LINE, run, "first", {"score": "high"})
    give_up(shop.store, LINE, run, "second", code="author_mistake", details={"gate": "{{first.score}} >= 0.5"})
    page = ann.get(f"/run/{run}").text
    assert "The gate first.score &gt;= 0.5 could not be evaluated" in page
    assert "Gate, which could not be evaluated" in page
    assert "held" not in page


def test_a_graph_puts_dependencies_to_the_left_and_no_edge_behind_an_agent():
    """A diamond with a shortcut: columns by depth, and the shortcut runs through a row of its own."""
    drawn = layout({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c", "a"]})
    at = {node.agent: node for node in drawn.nodes}
    assert at["a"].x < at["b"].x == at["c"].x < at["d"].x
    (shortcut,) = [edge for edge in drawn.edges if (edge.source, edge.target) == ("a", "d")]
    row = float(re.search(r"L[\d.]+ ([\d.]+)", shortcut.path)[1])
    assert all(abs(node.middle - row) > NODE_HEIGHT_PX / 2 for node in (at["b"], at["c"]))
    assert max(node.y for node in drawn.nodes) + NODE_HEIGHT_PX <= drawn.height


def test_long_values_end_with_a_note():
    """A page shows the beginning, and says how much there is besides."""
    shown = view.value({f"field{number}": "x" * 5_000 for number in range(1_000)})
    assert len(shown) == view.VALUE_MAX_LINES + 1
    assert all(len(line) <= view.LINE_MAX_CHARS for line, _ in shown)
    assert "1,600 more lines" in shown[-1][0]
