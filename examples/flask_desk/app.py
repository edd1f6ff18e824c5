"""A help desk in Flask: a form starts a run together with its ticket, a page follows it, a button sends the answer.

The module is called app.py, as most Flask projects have it; the workers' own package of that name is not in its way.
"""

import os
import secrets
from uuid import UUID

from flask import Flask, abort, flash, jsonify, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from stepfast import Misuse
from stepfast.flask import Stepfast

db = SQLAlchemy(model_class=type("Base", (DeclarativeBase,), {}))
stepfast = Stepfast()


class Ticket(db.Model):  # type: ignore[name-defined, misc]  # Flask-SQLAlchemy makes the class at run time
    id: Mapped[int] = mapped_column(primary_key=True)
    subject: Mapped[str]
    body: Mapped[str]
    state: Mapped[str] = mapped_column(default="open")
    answer: Mapped[str] = mapped_column(default="")
    run_id: Mapped[UUID | None]


def create_app() -> Flask:
    """The application; its addresses and its secret come from `examples/start.py`."""
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=os.environ["DESK_SECRET"],
        # The same database as Stepfast's: a ticket and its run are one transaction.
        SQLALCHEMY_DATABASE_URI=os.environ["EXAMPLE_DATABASE_URL"].replace("://", "+psycopg://", 1),
        STEPFAST_BROKER=os.environ.get("EXAMPLE_BROKER_URL"),
        SESSION_COOKIE_SAMESITE="Lax",
    )
    db.init_app(app)
    stepfast.init_app(app)
    app.before_request(_check_token)
    app.jinja_env.globals["token"] = _token
    app.add_url_rule("/", view_func=tickets, methods=["GET", "POST"])
    app.add_url_rule("/tickets/<int:number>", view_func=ticket)
    app.add_url_rule("/tickets/<int:number>/status", view_func=status)
    app.add_url_rule("/tickets/<int:number>/send", view_func=send, methods=["POST"])
    app.cli.command("create-tables")(create_tables)
    return app


def tickets() -> ResponseReturnValue:
    if request.method == "POST":
        made = Ticket(subject=request.form["subject"][:200], body=request.form["body"][:10_000])
        db.session.add(made)
        db.session.flush()
        given = {"ticket": made.id, "subject": made.subject, "body": made.body}
        made.run_id = stepfast.enqueue("triage", given, key=f"ticket-{made.id}").id
        db.session.commit()
        return redirect(url_for("ticket", number=made.id))
    newest = db.session.scalars(db.select(Ticket).order_by(Ticket.id.desc()).limit(20)).all()
    return render_template("tickets.html", tickets=newest)


def ticket(number: int) -> ResponseReturnValue:
    return render_template("ticket.html", ticket=db.get_or_404(Ticket, number))


def status(number: int) -> ResponseReturnValue:
    """What the page asks for twice a second."""
    found = db.get_or_404(Ticket, number)
    now = stepfast.run(found.run_id).status()
    asks = [{"agent": ask.agent, "digest": ask.digest, "shown": ask.shown} for ask in now.asks]
    return jsonify(
        ticket=found.state, answer=found.answer, run=now.state, steps=dict(now.steps), asks=asks, error=now.error
    )


def send(number: int) -> ResponseReturnValue:
    """Exactly what the page showed is approved: the digest names it."""
    found = db.get_or_404(Ticket, number)
    try:
        order = stepfast.run(found.run_id).approve("send", by="desk", digest=request.form["digest"])
        db.session.commit()
        order.wait()
    except Misuse as error:
        flash(str(error))
    return redirect(url_for("ticket", number=number))


def create_tables() -> None:
    """Make the desk's own table."""
    db.create_all()


def _token() -> str:
    return str(session.setdefault("token", secrets.token_urlsafe(20)))


def _check_token() -> None:
    """No other site's page may write in a visitor's name."""
    if request.method == "POST" and not secrets.compare_digest(request.form.get("token", ""), _token()):
        abort(403)
