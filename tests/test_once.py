"""`ctx.once`: an effect is done once in a generation, however often its step is attempted."""

import pytest
from deploying import Memory
from working import call_handler as call

from app.agents import Happened, NotHappened, Unknown
from app.agents.context import EFFECT_MAX_BYTES
from app.agents.work import Effect, EffectState
from app.errors import AuthorMistake, HandlerFailed, InvalidOutput, OutcomeUnknown, StaleClaim


class Outside:
    """The outside world: counts what was done to it."""

    def __init__(self, answer=None):
        self.done = 0
        self.looked = 0
        self.answer = answer

    def act(self):
        self.done += 1
        return {"n": self.done}

    def look(self):
        self.looked += 1
        return self.answer


def once(effects, outside, *, check=True, **options):
    function = options.get("act", outside.act)
    return call(lambda ctx: ctx.once("pay", function, check=outside.look if check else None), effects=effects)


def test_effect_is_done_once_and_then_remembered():
    """The second attempt gets the first's output, and does nothing."""
    effects, outside = Memory(), Outside()
    assert once(effects, outside) == {"n": 1}
    assert once(effects, outside) == {"n": 1}
    assert (outside.done, outside.looked) == (1, 0)


def _begun():
    effects = Memory()
    effects.begin("pay")
    return effects


def test_unknown_effect_that_happened_is_recorded():
    """The check finds it: its output is taken, and recorded."""
    effects, outside = _begun(), Outside(Happened({"n": 9}))
    assert once(effects, outside) == {"n": 9}
    assert outside.done == 0
    assert effects.begin("pay") == Effect(EffectState.HAPPENED, {"n": 9})


def test_unknown_effect_that_did_not_happen_is_done():
    """The check looked, so it may be done now."""
    effects, outside = _begun(), Outside(NotHappened())
    assert once(effects, outside) == {"n": 1}
    assert (outside.done, outside.looked) == (1, 1)


@pytest.mark.parametrize("answer", [Unknown(), None])
@pytest.mark.parametrize("check", [True, False])
def test_unknown_effect_stays_unknown_where_nobody_can_tell(answer, check):
    """Without a check, or where it cannot tell, a person decides; nothing is repeated."""
    outside = Outside(answer)
    with pytest.raises(OutcomeUnknown) as caught:
        once(_begun(), outside, check=check)
    assert outside.done == 0
    assert caught.value.details["key"] == "pay"
    assert "stepfast override" in caught.value.next_step
    assert "stepfast resume" in caught.value.next_step


def test_effect_that_raised_is_unknown_until_somebody_looks():
    """It may have happened before it raised: the retry looks first."""
    effects, outside = Memory(), Outside(NotHappened())

    def breaks():
        raise ConnectionError("gone")

    with pytest.raises(HandlerFailed, match="gone"):
        once(effects, outside, act=breaks)
    assert effects.begin("pay").state is EffectState.UNKNOWN
    assert once(effects, outside) == {"n": 1}


@pytest.mark.parametrize("output", [None, [1], {"t": "\0"}, {"o": object()}, {"t": "x" * EFFECT_MAX_BYTES}])
def test_effect_whose_output_cannot_be_recorded_stays_begun(output):
    """It happened, and its output is lost: the retry must look, not do it again."""
    effects = Memory()
    with pytest.raises(InvalidOutput):
        call(lambda ctx: ctx.once("pay", lambda: output), effects=effects)
    assert effects.begin("pay").state is EffectState.UNKNOWN


@pytest.mark.parametrize("key", ["", "k" * 201, "a\0b", None, 7])
def test_key_of_an_effect_is_a_short_text(key):
    """A bad key is found before anything is done."""
    outside = Outside()
    with pytest.raises(AuthorMistake):
        call(lambda ctx: ctx.once(key, outside.act))
    assert outside.done == 0


def test_fenced_attempt_does_nothing():
    """`begin` refuses an attempt that lost its claim, before the effect."""

    class Fenced(Memory):
        def begin(self, key):
            raise StaleClaim("fenced")

    outside = Outside()
    with pytest.raises(StaleClaim):
        once(Fenced(), outside)
    assert outside.done == 0
