# noqa: INP001  # a script, no package
"""Draws demo.svg from a real `stepfast demo`, run in a terminal of tmux: `python docs/images/record_demo.py`."""

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).with_name("demo.svg")
COLUMNS, ROWS = 100, 40
TIMEOUT_S = 120.0
POLL_S = 0.2
# How servers and workers start and stop, where their logs are, and what tmux adds.
DULL = re.compile(r"Starting |Migrated |Stopping |Next: |agents.* starts again |/\S+\.log\.$|Pane is dead")
# Rich's page loads a font from elsewhere; a picture should not.
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font: bold 18px system-ui, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""


def record(folder: Path) -> str:
    """What the terminal shows in the end, with its colours as escape codes. Raises CalledProcessError, TimeoutError."""
    bin_folder = Path(sys.executable).parent
    environ = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "STEPFAST_HOME": str(folder / ".stepfast")}
    demo = f"env -i {shlex.join(f'{name}={value}' for name, value in environ.items())} TERM=$TERM stepfast demo"
    server = ["tmux", "-f", os.devnull, "-S", str(folder / "tmux")]

    def tmux(*arguments: str) -> str:
        return subprocess.run([*server, *arguments], check=True, capture_output=True, text=True).stdout  # noqa: S603

    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), "-c", str(folder), "cat")
    try:
        tmux("set-option", "-g", "remain-on-exit", "on")
        tmux("respawn-pane", "-k", "-c", str(folder), demo)
        deadline = time.monotonic() + TIMEOUT_S
        while tmux("display-message", "-p", "#{pane_dead}").strip() != "1":
            if time.monotonic() > deadline:
                raise TimeoutError("The demo did not end.")
            time.sleep(POLL_S)
        return tmux("capture-pane", "-p", "-e", "-S", "-")
    finally:
        tmux("kill-server")


def draw(shown: str) -> str:
    """The picture of what was shown, without the lines that are DULL."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in Text.from_ansi(shown.strip()).split("\n"):
        if not DULL.match(line.plain):
            console.print(line, highlight=False)
    return console.export_svg(title="make demo", theme=MONOKAI, code_format=FORMAT, unique_id="demo")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        PICTURE.write_text(draw(record(Path(name))))
