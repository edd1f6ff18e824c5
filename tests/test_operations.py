"""What an input may be, before anything is stored."""

import pytest

from app.errors import Misuse
from app.pipelines.run_input import check_input


def _circular():
    made = {}
    made["me"] = made
    return made


@pytest.mark.parametrize("run_input", [_circular(), {"a": float("nan")}, {"a": "\ud800"}, {"a": b"x"}, {1: "a"}, []])
def test_input_that_is_no_json_is_refused(run_input):
    """In one sentence, and within a bounded time also where it contains itself."""
    with pytest.raises(Misuse):
        check_input(run_input, 1_000, None)
