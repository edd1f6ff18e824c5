"""`stepfast.flask`: the session's transaction, the factory, the commands."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import eventually
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hosting import UNSWEPT, fetch, publish
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from stepfast.errors import KeyConflict, NotReady
from stepfast.flask import Stepfast

COUNT = "select count(*) from stepfast.runs"


class Base(DeclarativeBase):
    pass


class Ticket(Base):
    __tablename__ = "ticket"
    id: Mapped[int] = mapped_column(primary_key=True)


db = SQLAlchemy(model_class=Base)
stepfast = Stepfast()


@pytest.fixture
def make_app(database_url, broker_url):
    """A factory, as docs/flask.md has it; its connections are closed after the test."""
    made = []

    def make(**config) -> Flask:
        app = Flask("host")
        app.config.update({"SQLALCHEMY_DATABASE_URI": database_url, "STEPFAST_BROKER": broker_url} | config)
        db.init_app(app)
        stepfast.init_app(app)
        with app.app_context():
            Base.metadata.create_all(db.engine)
        made.append(app)
        return app

    yield make
    for app in made:
        with app.app_context():
            db.session.remove()
            db.engine.dispose()


def _counts(url) -> tuple[int, int]:
    return fetch(url, "select count(*) from ticket")[0][0], fetch(url, COUNT)[0][0]


def test_run_and_ticket_are_one_transaction(system, here, write_skill, make_app, database_url):
    """Both or neither, by the session's commit or rollback; after it the message starts the run at once."""
    pipeline = publish(system, here, write_skill)
    system.start_worker(**UNSWEPT)
    with make_app().app_context():
        db.session.add(Ticket())
        stepfast.enqueue(pipeline, {"order": 1})
        db.session.rollback()
        assert _counts(database_url) == (0, 0)
        db.session.add(Ticket())
        run = stepfast.enqueue(pipeline, {"order": 2}, key="two")
        assert _counts(database_url) == (0, 0)
        db.session.commit()
        assert _counts(database_url) == (1, 1)
        assert run.result(timeout_s=30)["ship"] == {"shipped": 2}
        assert not db.session().in_transaction()
        with pytest.raises(KeyConflict):
            stepfast.enqueue(pipeline, {"order": 3}, key="two")
        db.session.rollback()


DIES = """
import os, signal, sys
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from stepfast.flask import Stepfast

app, db, stepfast = Flask("host"), SQLAlchemy(), Stepfast()
app.config.update(SQLALCHEMY_DATABASE_URI=sys.argv[1], STEPFAST_BROKER=sys.argv[2])
db.init_app(app)
stepfast.init_app(app)

@app.post("/")
def start():
    stepfast.enqueue(sys.argv[3], {"order": 1})
    if sys.argv[4] == "after":
        db.session.commit()
    os.kill(os.getpid(), signal.SIGKILL)

app.test_client().post("/")
"""


@pytest.mark.parametrize(("when", "count"), [("before", 0), ("after", 1)])
def test_view_that_dies_started_what_it_committed(system, here, write_skill, database_url, broker_url, when, count):
    """SIGKILL between the commit and the response: the run is carried out; before the commit there is none."""
    pipeline = publish(system, here, write_skill)
    argv = [sys.executable, "-c", DIES, database_url, broker_url, pipeline, when]
    assert subprocess.run(argv, cwd="/", check=False).returncode == -signal.SIGKILL
    found = fetch(database_url, "select id from stepfast.runs")
    assert len(found) == count
    if found:
        system.start_worker(queues="handlers")
        assert system.ended(found[0][0])["state"] == "completed"


def test_applications_of_one_process_keep_apart(system, here, write_skill, make_app, database_url):
    """The factory's way: each application has its own client; one with a database of Stepfast's own joins no session."""
    pipeline = publish(system, here, write_skill)
    with make_app(STEPFAST_DATABASE_URL=database_url).app_context():
        stepfast.enqueue(pipeline, {"order": 1})
        db.session.rollback()
        assert _counts(database_url) == (0, 1)
    with Flask("bare").app_context(), pytest.raises(NotReady, match="init_app"):
        stepfast.enqueue(pipeline, {"order": 1})


def test_commands_list_resume_and_approve(system, here, write_skill, make_app, database_url):
    """`flask stepfast runs|resume|approve`: real runs, sentences, exit codes."""
    pipeline = publish(system, here, write_skill, approval=True)
    system.start_worker(queues="handlers")
    app = make_app()

    def type_(*arguments):
        return app.test_cli_runner().invoke(args=["stepfast", *arguments])

    with app.app_context():
        good = stepfast.enqueue(pipeline, {"order": 1}).id
        bad = stepfast.enqueue(pipeline, {"order": 2, "broken": True}).id
        db.session.commit()
    assert system.ended(bad)["state"] == "failed"
    assert str(bad) in type_("runs").output
    assert [run["id"] for run in json.loads(type_("runs", "--state", "failed", "--json").output)] == [str(bad)]
    assert "Would resume 1 of tested, check (handler_failed)" in type_("resume", "--failed", "--plan").output
    done = type_("resume", "--failed", "--since", "1h")
    assert (done.exit_code, done.output) == (0, "tested, check (handler_failed): 1 of 1 resumed.\n")
    eventually(lambda: system.run(bad)["state"] == "failed", what="its second failure")
    assert type_("resume", str(bad)).output == f"Run {bad} goes on with check.\n"
    assert type_("resume", str(good)).exit_code == 2
    assert type_("resume").exit_code == 2

    eventually(lambda: system.run(good)["state"] == "suspended", what="the question")
    asked = app.test_cli_runner().invoke(args=["stepfast", "approve", str(good), "ship"], input="n\n")
    assert (asked.exit_code, '"order": 1' in asked.output) == (1, True)
    assert system.run(good)["state"] == "suspended"
    assert type_("approve", str(good), "ship", "--yes", "--by", "ann").output.endswith("ship is approved.\n")
    assert system.ended(good)["state"] == "completed"
    refused = type_("approve", str(good), "ship", "--yes")
    assert (refused.exit_code, "waits for no decision" in refused.output) == (2, True)


def test_flask_finds_the_commands(tmp_path, database_url):
    """`flask --app app stepfast`, in a project whose module is app.py."""
    (tmp_path / "app.py").write_text(
        "from flask import Flask\nfrom stepfast.flask import Stepfast\napp = Flask(__name__)\n"
        f"app.config['STEPFAST_DATABASE_URL'] = {database_url!r}\nStepfast(app)\n"
    )
    argv = [sys.executable, "-m", "flask", "--app", "app", "stepfast", "runs"]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True
    )
    assert done.stdout == "There is no such run.\n"
