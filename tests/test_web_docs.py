"""docs/enqueue.md, docs/django.md and docs/flask.md: every snippet and command in them runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import celery
import djangohost
import psycopg
import pytest
import sqlalchemy
import stepfast
from conftest import ROOT, eventually
from djangohost import Host
from hosting import fetch, publish
from sqlalchemy.orm import Session


def blocks(name: str, kind: str) -> list[str]:
    text = (ROOT / "docs" / name).read_text()
    return [
        body for found, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if found == kind
    ]


@pytest.fixture(scope="module")
def _django_template(servers, _template):
    with djangohost.template(servers, _template) as made:
        yield made


@pytest.fixture
def database_template(_django_template):
    return _django_template


def test_enqueue(system, here, write_skill, database_url, broker_url, monkeypatch, capsys):
    """In order: SQLAlchemy, an approval, plain SQL, Celery, and the rights."""
    publish(system, here, write_skill)
    system.start_worker()
    engine = sqlalchemy.create_engine(database_url)
    first, approval, from_celery = blocks("enqueue.md", "python")
    names = {"engine": engine, "celery_app": celery.Celery("host", broker=broker_url, set_as_current=False)}
    exec(first, names)
    assert capsys.readouterr().out == "completed {'shipped': 7}\n"

    publish_again(system, here, write_skill)
    with Session(engine) as session:
        run = stepfast.Client().enqueue("tested", {"order": 1}, connection=session)
        session.commit()
        names |= {"session": session, "run": run}
        eventually(lambda: run.status().asks, what="the question")
        exec(approval, names)
        assert run.result(timeout_s=20)["ship"] == {"shipped": 1}

    for statement in blocks("enqueue.md", "sql")[0].strip().split(";\n"):
        shown = fetch(database_url, statement.rstrip(";"))
    assert shown == [("completed",)]
    exec(from_celery, names)
    eventually(
        lambda: fetch(database_url, "select from stepfast.runs where input->>'order' = '8'"), what="Celery's run"
    )
    engine.dispose()

    (command,) = [block for block in blocks("enqueue.md", "") if "migrate" in block]
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
        for role in ("web", "backoffice"):
            connection.execute(f"create role {role}")
        try:
            program, *arguments = shlex.split(command)
            argv = [str(Path(sys.executable).with_name(program)), *arguments]
            subprocess.run(argv, env=system.environ, check=True, capture_output=True)
            rights = "select has_function_privilege(%s, 'stepfast.request_v1(text,uuid,text,text,text,text,uuid)', 'execute')"
            assert [fetch(database_url, rights, role)[0][0] for role in ("web", "backoffice")] == [False, True]
        finally:
            for role in ("web", "backoffice"):
                connection.execute(f"drop owned by {role}")
                connection.execute(f"drop role {role}")


def publish_again(system, here, write_skill) -> None:
    """The same, whose second agent waits for a person."""
    from hosting import AGENTS, FILES, HANDLERS

    folder = write_skill(AGENTS, HANDLERS, files=FILES)
    file = folder / "tested.skill.yaml"
    file.write_text(file.read_text().replace("1.0.0", "2.0.0") + "input_schema: order\n")
    system.publish(here, folder)


def test_django(system, here, write_skill, database_url, broker_url):
    """The settings, the view, the receiver, the handler, the task (where Django has them), and each command."""
    publish(system, here, write_skill)
    host = Host(djangohost.environment(database_url, broker_url))
    settings, view, receiver, handler, task = blocks("django.md", "python")
    code = [
        "INSTALLED_APPS = []",
        settings,
        "from stepfast.django.conf import Configuration",
        "assert {name.upper() for name in Configuration.__slots__} == set(STEPFAST)",
        "from shop.models import Order",
        view,
        receiver,
        handler,
        "from types import SimpleNamespace",
        "ctx = SimpleNamespace(run=SimpleNamespace(input={'order': order.pk}))",
        "assert ship(ctx) == {'order': order.pk}",
        "assert Order.objects.get().state == 'shipped'",
        "from stepfast.django.models import Run",
        "assert Run.objects.get().pk == run.id",
        "if django.VERSION >= (6,):",
        *(f"    {line}" for line in task.splitlines()),
    ]
    host.script("\n".join(code))
    commands = [line for block in blocks("django.md", "") for line in block.splitlines() if "manage.py" in line]
    assert len(commands) == 5
    for line in commands:
        host.manage(*shlex.split(line)[2:])


def test_flask(system, here, write_skill, database_url, broker_url, tmp_path):
    """The factory, the view, and each command."""
    publish(system, here, write_skill)
    factory, view = blocks("flask.md", "python")
    module = [
        f"DATABASE_URL, BROKER_URL = {database_url!r}, {broker_url!r}",
        factory,
        "class Ticket(db.Model):",
        "    id = db.Column(db.Integer, primary_key=True)",
        "if __name__ == '__main__':",
        "    with create_app().app_context():",
        "        db.create_all()",
        *(f"        {line}" for line in view.splitlines()),
    ]
    (tmp_path / "desk.py").write_text("\n".join(module))
    subprocess.run([sys.executable, "desk.py"], cwd=tmp_path, check=True)
    assert fetch(database_url, "select key from stepfast.runs") == [("ticket-1",)]
    commands = [line for block in blocks("flask.md", "") for line in block.splitlines() if line.startswith("flask")]
    assert len(commands) == 3
    for line in commands:
        subprocess.run([sys.executable, "-m", *shlex.split(line)], cwd=tmp_path, check=True, capture_output=True)
