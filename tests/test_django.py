"""`stepfast.django` in real Django processes: transactions, commands, checks, the signal."""

import json
import signal
import textwrap

import djangohost
import psycopg
import pytest
from conftest import eventually
from djangohost import Host
from hosting import UNSWEPT, fetch, plain, publish

COUNT = "select count(*) from stepfast.runs"


@pytest.fixture(scope="module")
def _django_template(servers, _template):
    yield from _given(djangohost.template(servers, _template))


def _given(manager):
    with manager as made:
        yield made


@pytest.fixture
def database_template(_django_template):
    return _django_template


@pytest.fixture
def host(system):
    return Host(djangohost.environment(system.database_url, system.broker_url))


ATOMIC = """
    from django.db import transaction
    import stepfast
    from shop.models import Order
    from stepfast.django import enqueue
    from stepfast.django.models import Run, Step

    def order(fails):
        with transaction.atomic():
            made = Order.objects.create(customer="Ann", item="tea", quantity=1)
            run = enqueue("tested", {"order": made.pk}, key=f"order-{made.pk}")
            if fails:
                raise ValueError
            return made.pk, run

    try:
        order(fails=True)
    except ValueError:
        pass
    assert Run.objects.count() == Order.objects.count() == 0
    pk, run = order(fails=False)
    assert [(row.pk, row.key) for row in Run.objects.all()] == [(run.id, f"order-{pk}")]
    assert Order.objects.count() == 1
    with transaction.atomic():
        # Without Django's part: the configured client joins, too.
        joined = stepfast.enqueue("tested", {"order": 2})
        try:
            with transaction.atomic():
                enqueue("tested", {"order": 3})
                raise ValueError
        except ValueError:
            pass
    assert set(Run.objects.values_list("pk", flat=True)) == {run.id, joined.id}
    # Outside a transaction it is committed at once.
    assert enqueue("tested", {"order": 4}, key=f"k").created
    assert not enqueue("tested", {"order": 4}, key=f"k").created
    for call, error in (
        (lambda: enqueue("tested", {}), stepfast.InvalidInput),
        (lambda: enqueue("nothing", {}), stepfast.UnknownName),
        (lambda: enqueue("tested", {"order": 5}, key="k"), stepfast.KeyConflict),
        (lambda: Run(pk=run.id).save(), NotImplementedError),
        (lambda: Run.objects.get(pk=run.id).delete(), NotImplementedError),
    ):
        try:
            call()
        except error:
            continue
        raise AssertionError(error)
    assert [step.agent for step in Step.objects.filter(run=run.id).order_by("agent")] == ["check", "ship"]
    assert run.result(timeout_s=30)["ship"] == {"shipped": pk}
    print("good")
"""


def test_run_and_order_are_one_transaction(system, host, pipeline):
    """Both or neither, also in a savepoint; errors are clear; the models only read; and the message starts it at once."""
    system.start_worker(**UNSWEPT)
    assert host.script(ATOMIC) == "good\n"


DIES = """
    import os, signal, sys
    from django.db import transaction
    from shop.models import Order
    from stepfast.django import enqueue
    when = os.environ["WHEN"]
    with transaction.atomic():
        made = Order.objects.create(customer="Ann", item="tea", quantity=1)
        if when == "after":
            transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))
        enqueue("tested", {"order": made.pk})
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("when", "count"), [("before", 0), ("after", 1)])
def test_process_that_dies_keeps_order_and_run_together(system, host, pipeline, database_url, when, count):
    """SIGKILL before the commit: neither; right after it, before any message: both, and the run is carried out."""
    host.script(DIES, check=False, WHEN=when)
    assert fetch(database_url, "select count(*) from shop_order") == fetch(database_url, COUNT) == [(count,)]
    if count:
        system.start_worker(queues="handlers")
        ((run_id,),) = fetch(database_url, "select id from stepfast.runs")
        assert system.ended(run_id)["state"] == "completed"


ELSEWHERE = """
    import os
    from django.db import connections, transaction
    from stepfast import InvalidInput
    from stepfast.django import enqueue
    from stepfast.django.models import Run

    try:
        with transaction.atomic():
            enqueue("tested", {"order": 1})
            raise ValueError
    except ValueError:
        pass
    assert not Run.objects.exists()
    with transaction.atomic():
        try:
            enqueue("tested", {"order": "one"})  # refused at the call all the same
            raise AssertionError
        except InvalidInput:
            pass
        run = enqueue("tested", {"order": 2}, key="two")
        assert not Run.objects.exists()
    assert (Run.objects.get().pk, run.created) == (run.id, True)
    with transaction.atomic():
        again = enqueue("tested", {"order": 2}, key="two")
        assert again.id != run.id
    assert (again.id, again.created) == (run.id, False)
    assert enqueue("tested", {"order": 3}).created
    print("good", flush=True)
    with transaction.atomic():
        connections["default"].cursor().execute("create table was_committed (x integer)")
        transaction.on_commit(lambda: os._exit(1))
        enqueue("tested", {"order": 4})
"""


def test_run_in_another_database_starts_after_the_commit(host, pipeline, database_url, empty_database_url, tmp_path):
    """The weaker guarantee, as it is documented: a rollback starts nothing; a death right after the commit loses the run."""
    name = empty_database_url.partition("?")[0].rpartition("/")[2]
    (tmp_path / "elsewhere.py").write_text(
        "from shop.settings import *\n"
        "DATABASES['stepfast'] = DATABASES['default']\n"
        f"DATABASES['default'] = DATABASES['default'] | {{'NAME': {name!r}}}\n"
        "STEPFAST = {'DATABASE': 'stepfast'}\n"
    )
    where = {"DJANGO_SETTINGS_MODULE": "elsewhere", "PYTHONPATH": f"{tmp_path}:{host.environ['PYTHONPATH']}"}
    assert host.script(ELSEWHERE, check=False, **where) == "good\n"
    assert fetch(empty_database_url, "select count(*) from was_committed") == [(0,)]
    assert fetch(database_url, "select count(*) from stepfast.runs where input->>'order' = '4'") == [(0,)]


HANDLERS = """
    import pathlib

    def fix(ctx):
        if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
            raise ValueError("the disk is on fire")
        return {}

    def refuse(ctx):
        return {}
"""
FAILING = """
    - {id: fix, retry_policy: {max_attempts: 1}}
    - {id: refuse, depends_on: [fix], gate: "{{input.good}} == true"}
"""


def test_commands_list_and_resume_what_failed_for_real(system, here, write_skill, host, database_url, tmp_path):
    """Many that failed alike: the plan, one that goes first and fails again, and, once it is mended, all of them."""
    import stepfast

    system.start_worker(queues="handlers")
    schema = {
        "type": "object",
        "properties": {"folder": {"type": "string"}, "good": {"type": "boolean"}},
        "required": ["folder", "good"],
    }
    folder = write_skill(FAILING, HANDLERS, files={"schemas/given.json": json.dumps(schema)})
    file = folder / "tested.skill.yaml"
    file.write_text(file.read_text() + "input_schema: given\n")
    name = system.publish(here, folder)
    client = stepfast.Client(database_url)
    runs = [client.enqueue(name, {"folder": str(tmp_path), "good": number > 0}) for number in range(7)]
    for run in runs:
        assert system.ended(run.id)["state"] == "failed"

    planned = host.manage("stepfast_resume", "--failed", "--plan").stdout
    assert planned == "Would resume 7 of tested, fix (handler_failed): ValueError: the disk is on fire\n"
    done = host.manage("stepfast_resume", "--failed", "--by", "ann", check=False)
    assert (done.returncode, "1 of 7 resumed" in done.stdout, "the first is" in done.stdout) == (1, True, True)
    (tmp_path / "mended").touch()
    eventually(
        lambda: not fetch(database_url, "select from stepfast.runs where state <> 'failed'"),
        what="the first, failed again",
    )
    assert (
        host.manage("stepfast_resume", "--failed", "--pipeline", "other", "--since", "2h").stdout
        == "No run has failed.\n"
    )
    done = host.manage("stepfast_resume", "--failed", "--since", "2h")
    assert "7 of 7 resumed" in done.stdout
    states = eventually(
        lambda: (states := sorted(system.run(run.id)["state"] for run in runs)).count("running") == 0 and states,
        what="the end of all",
    )
    assert states == ["completed"] * 6 + ["failed"]

    listed = json.loads(host.manage("stepfast_runs", "--state", "failed", "--json").stdout)
    assert [run["id"] for run in listed] == [str(runs[0].id)]
    assert str(runs[0].id) in host.manage("stepfast_runs").stdout
    assert "Left alone, 1 of tested, refuse (gate_refused)" in host.manage("stepfast_resume", "--failed").stdout
    refused = host.manage("stepfast_resume", "--run", str(runs[1].id), check=False)
    assert (refused.returncode, "does not allow it" in refused.stderr) == (2, True)
    assert "goes on with refuse" in host.manage("stepfast_resume", "--run", str(runs[0].id)).stdout


CHECKS = """
    from django.core.checks import run_checks
    from django.test import override_settings

    def said(**settings):
        with override_settings(**settings):
            return [(found.id, found.msg) for found in run_checks(databases=["default"]) if found.id.startswith("stepfast")]

    assert said() == [], said()
    (found,) = said(STEPFAST={"DATABSE": "default"})
    assert found == ("stepfast.E001", "STEPFAST has 'DATABSE', which is no setting. Did you mean DATABASE?")
    (found,) = said(STEPFAST={"DATABASE": "nothing"})
    assert found[0] == "stepfast.E001"
    assert [found[0] for found in said(STEPFAST={})] == ["stepfast.W001"]
    print("good")
"""


def test_system_checks_name_what_is_wrong(host, empty_database_url):
    """The settings' names, and a database that has no Stepfast."""
    assert host.script(CHECKS) == "good\n"
    where = {"EXAMPLE_DATABASE_URL": empty_database_url.replace("+psycopg", "")}
    done = host.manage("check", "--database", "default", check=False, **where)
    assert done.returncode == 1
    assert "(stepfast.E003) This database has no Stepfast. Run: stepfast migrate" in done.stderr


def test_signal_is_sent_at_least_once(system, host, pipeline, database_url):
    """The shop's own receiver notes a failed run in its order; a second watch repeats it, and does no harm."""
    system.start_worker(queues="handlers")
    said = host.script("""
        from django.db import transaction
        from shop.models import Order
        from stepfast.django import enqueue
        with transaction.atomic():
            order = Order.objects.create(customer="Ann", item="tea", quantity=1)
            run = enqueue("tested", {"order": order.pk, "broken": True})
            order.run_id = run.id
            order.save()
        print(run.id)
    """)
    system.ended(said.strip())
    failing = """
        from django.core.management import call_command
        from stepfast.django import run_ended
        seen = []
        def fails(run, **_):
            seen.append(run.state)
            raise ValueError("mine")
        run_ended.connect(fails)
        for _ in range(2):
            call_command("stepfast_watch", "--once")
        print(seen)
    """
    assert host.script(failing) == "['failed', 'failed']\n"
    assert fetch(database_url, "select note from shop_order") == [("Its fulfilment is failed.",)]


BROKEN = """
    from shop.models import Order
    from stepfast.django import enqueue
    order = Order.objects.create(customer="Ann", item="tea", quantity=1)
    order.run_id = enqueue("tested", {"order": order.pk, "broken": True}).id
    order.save()
"""


def test_watch_outlives_a_restart_of_postgres_and_ends_on_ctrl_c(
    system, host, pipeline, servers, database_url, tmp_path
):
    """Its session is cut and it is refused for a while: it says so, goes on when it may, and leaves without a traceback."""
    name = fetch(database_url, "select current_database()")[0][0]
    asks = "select pid from pg_stat_activity where datname = current_database() and query ~ '^SELECT.*v_runs'"
    with (
        host.started("manage.py", "stepfast_watch", log=tmp_path / "watch.log") as watch,
        psycopg.connect(plain(servers.database_url), autocommit=True) as admin,
    ):
        pid = eventually(lambda: fetch(database_url, asks), what="a watch that asks")[0][0]
        admin.execute(f"alter database {name} allow_connections false")
        admin.execute("select pg_terminate_backend(%s)", (pid,))
        eventually(lambda: "is asked again" in watch.log.read_text(), what="a watch that says so")
        admin.execute(f"alter database {name} allow_connections true")
        system.start_worker(queues="handlers")
        host.script(BROKEN)
        note = "select note from shop_order"
        eventually(lambda: fetch(database_url, note) == [("Its fulfilment is failed.",)], what="the signal")
        watch.send_signal(signal.SIGINT)
        assert watch.wait(timeout=30) == 0
    assert "Traceback" not in watch.log.read_text()


def test_watch_gives_up_on_a_database_that_stays_away(host):
    """After a time, or at once where it asks but once: a sentence, and exit code 3."""
    nowhere = {"EXAMPLE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    done = host.manage("stepfast_watch", "--once", check=False, **nowhere)
    assert (done.returncode, "The database does not answer: " in done.stderr) == (3, True)
    assert "Traceback" not in done.stderr
    code = """
        import django, sys; django.setup()
        from django.core.management import ManagementUtility
        from stepfast.django.management.commands import stepfast_watch
        stepfast_watch.OUTAGE_MAX_S = 1.5
        ManagementUtility(["manage.py", "stepfast_watch"]).execute()
    """
    done = host.run("-c", textwrap.dedent(code), check=False, **nowhere)
    assert done.returncode == 3
    assert done.stderr.count("is asked again") >= 1
    assert "Traceback" not in done.stderr


def test_audit_is_the_workers_own(host, tmp_path):
    """It prints what `stepfast audit` does, and ends as it does."""
    done = host.manage("stepfast_audit", str(djangohost.SHOP / "fulfilment"))
    assert "fulfilment 1.0.0 is valid." in done.stdout
    (tmp_path / "bad.skill.yaml").write_text("name: bad\n")
    assert host.manage("stepfast_audit", str(tmp_path / "bad.skill.yaml"), check=False).returncode == 2


def test_is_usable_as_a_django_task(host, pipeline):
    """A thin `django.tasks` task; Django has them since 6.0."""
    import django

    if django.VERSION < (6,):
        pytest.skip("Django 5.2 has no django.tasks")
    said = host.script("""
        import stepfast.django
        from django.tasks import task
        import sys, types
        module = types.ModuleType("tasks_of_host")
        sys.modules["tasks_of_host"] = module
        def start(order):
            return str(stepfast.django.enqueue("tested", {"order": order}, key=f"order-{order}").id)
        start.__module__, start.__qualname__ = "tasks_of_host", "start"
        module.start = task(start)
        print(module.start.enqueue(7).return_value == str(stepfast.django.models.Run.objects.get().pk))
    """)
    assert said == "True\n"


def test_limit_of_the_list_is_checked(host, pipeline):
    """A sentence and exit code 2."""
    done = host.manage("stepfast_runs", "--limit", "-1", check=False)
    assert (done.returncode, "--limit is 1 to" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


CHOSEN = """
    from django.contrib.auth.models import User
    from django.test import Client
    from stepfast.django import enqueue
    from stepfast.django.models import Run

    for number in range(130):
        run = enqueue("tested", {"order": number})
    web = Client(SERVER_NAME="127.0.0.1")
    web.force_login(User.objects.get(username="admin"))
    named, as_text = [], Run.__str__
    Run.__str__ = lambda self: named.append(self.pk) or as_text(self)

    def post(action, **more):
        given = {"action": action, "_selected_action": str(run.id), **more}
        return web.post("/admin/stepfast/run/", given, follow=True).content.decode()

    every = {"select_across": "1", "index": "0"}
    assert "Choose at most 100 at once" in post("cancel", **every)
    assert len(set(named)) <= 101, len(set(named))
    print("good")
"""


def test_admin_reads_no_more_runs_than_may_be_chosen(host, pipeline):
    """All of a long list chosen at once is refused, without reading all of it."""
    assert host.script(CHOSEN) == "good\n"


OTHERS = """
    import time
    from django.contrib.auth.models import User
    from django.test import Client
    from stepfast.django import enqueue

    run = enqueue("tested", {"order": 1})
    deadline = time.monotonic() + 30
    while not run.status().asks:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    web = Client(SERVER_NAME="127.0.0.1")
    web.force_login(User.objects.get(username="admin"))
    given = {"action": "approve", "_selected_action": str(run.id), "confirmed": "yes", "digest": "of something else"}
    print("Nothing was ordered" in web.post("/admin/stepfast/run/", given, follow=True).content.decode())
    print(len(run.status().asks))
"""


def test_admin_says_that_what_waits_is_not_what_was_shown(system, here, write_skill, host):
    """An approval of what was not seen is given to nobody, and not silently."""
    publish(system, here, write_skill, approval=True)
    system.start_worker(queues="handlers")
    assert host.script(OTHERS) == "True\n1\n"
