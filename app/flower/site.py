"""Adds our pages and metrics to Flower: their addresses, templates beside Flower's own, and places in its menu.

Flower has no hook for pages. Its configuration is executed before it builds itself, so what is put into its tables
here is as if it stood there (with url_prefix, too).
"""

import hashlib
from pathlib import Path

from flower import urls
from tornado.template import Loader, Template
from tornado.web import StaticFileHandler, url

from app.flower.letters import LetterApi, LetterDiscard, LetterPage, LettersApi, LettersPage
from app.flower.metrics import MetricsView, register
from app.flower.runs import RunAction, RunApi, RunDecision, RunPage, RunsApi, RunsPage

HERE = Path(__file__).parent
TEMPLATES, STATIC = HERE / "templates", HERE / "static"
# Without a group inside: Tornado could not make an address of it.
_ID = "([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"
_AGENT = r"([a-z][a-z0-9_]{0,63})"

HANDLERS = [
    url(r"/runs", RunsPage, name="stepfast_runs"),
    url(rf"/run/{_ID}", RunPage, name="stepfast_run"),
    url(rf"/run/{_ID}/(resume|cancel)", RunAction, name="stepfast_action"),
    url(rf"/run/{_ID}/(approve|reject)/{_AGENT}", RunDecision, name="stepfast_decision"),
    url(r"/dead-letters", LettersPage, name="stepfast_letters"),
    url(rf"/dead-letter/{_ID}", LetterPage, name="stepfast_letter"),
    url(rf"/dead-letter/{_ID}/discard", LetterDiscard, name="stepfast_discard"),
    url(r"/api/runs", RunsApi),
    url(rf"/api/run/info/{_ID}", RunApi),
    url(r"/api/dead-letters", LettersApi),
    url(rf"/api/dead-letter/info/{_ID}", LetterApi),
    url(r"/metrics", MetricsView),
    url(r"/stepfast/(.*)", StaticFileHandler, {"path": str(STATIC)}, name="stepfast_static"),
]


class Templates(Loader):
    """Our templates, and Flower's; its menu has our two entries behind its own."""

    def _create_template(self, name: str) -> Template:
        ours = TEMPLATES / name
        source = (ours if ours.is_file() else Path(self.root) / name).read_text()
        if name == "navbar.html":
            entries = (TEMPLATES / "menu_entries.html").read_text()
            source = source.replace("</ul>", f"{entries}</ul>", 1)
        return Template(source, name=name, loader=self)


def install() -> None:
    """Called while Flower reads its options."""
    # Browsers keep a file as long as its name is the same: `version` makes it another one.
    content = b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))
    namespace = {"static_version": hashlib.sha256(content).hexdigest()[:12]}
    urls.handlers[0:0] = HANDLERS
    register()
    urls.settings["template_loader"] = Templates(urls.settings["template_path"], namespace=namespace)
