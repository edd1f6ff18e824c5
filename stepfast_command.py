"""The script `stepfast`: makes sure that `app` is ours, and calls it.

A folder on PYTHONPATH comes before installed packages, and may hold another `app`.
"""

import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from app.cli.main import main as stepfast

    return stepfast()
