"""`python -m app.simulator --port N --script F --seed S`: the simulator as a process of its own."""

import argparse
import sys
from pathlib import Path

from app.errors import StepfastError
from app.simulator.server import serve


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app.simulator", description="Simulates Claude's API on loopback.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--script", type=Path, help="a YAML file of rules; app/simulator/script.py explains it")
    parser.add_argument("--seed", type=int, default=0, help="decides every sampled answer")
    arguments = parser.parse_args()
    try:
        serve(arguments.script, arguments.port, arguments.seed)
    except StepfastError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
