"""What calls cost."""

import pytest
from working import PROMPT, settings_for

from app.agents.pricing import ceiling_usd, cost_usd
from app.pipelines.model import Agent, Pipeline, RetryPolicy
from app.settings import MODEL_ALIASES

SETTINGS = settings_for("http://127.0.0.1:9")
ZERO = {"input_tokens": 0, "output_tokens": 0, "cache_read_tokens": 0, "cache_creation_tokens": 0, "thinking_tokens": 0}


@pytest.mark.parametrize("model", sorted({"claude-fable-5-2", *MODEL_ALIASES.values()}))
def test_every_model_that_an_alias_leads_to_has_a_price(model):
    """Prices are known offline, and output costs more than input."""
    spoken, heard = cost_usd(model, ZERO | {"output_tokens": 1000}), cost_usd(model, ZERO | {"input_tokens": 1000})
    assert spoken > heard > 0


def test_what_was_read_from_the_cache_costs_less():
    """`input_tokens` includes the cache's; a token is charged once."""
    plain = cost_usd("claude-sonnet-5-5", ZERO | {"input_tokens": 1000})
    read = cost_usd("claude-sonnet-5-5", ZERO | {"input_tokens": 1000, "cache_read_tokens": 1000})
    written = cost_usd("claude-sonnet-5-5", ZERO | {"input_tokens": 1000, "cache_creation_tokens": 1000})
    assert read < plain < written < 2 * plain


def test_unknown_model_has_no_price():
    """None says that nobody knows; 0 would say that it was free."""
    assert cost_usd("claude-of-tomorrow", ZERO | {"input_tokens": 5}) is None


def test_impossible_usage_has_no_price():
    """More from the cache than was read at all cannot be charged."""
    assert cost_usd("claude-sonnet-5-5", ZERO | {"cache_read_tokens": 5}) is None


def test_ceiling_is_above_what_every_attempt_can_cost():
    """Every attempt of every model at full length, with what the agents before it may have put out."""
    once = RetryPolicy(max_attempts=1)
    first = Agent("first", model="claude-3-5-sonnet", prompt=PROMPT, max_tokens=1000, retry_policy=once)
    second = Agent(
        "second", model="claude-opus-5-5", prompt=PROMPT, max_tokens=500, inputs=("first",), reads=("first",)
    )
    handler = Agent("third", handler="handlers:third", depends_on=("second",))
    one = ceiling_usd(Pipeline("p", "1", (first, handler)), {"text": "x" * 100}, SETTINGS)
    assert one > cost_usd("claude-sonnet-5-5", ZERO | {"input_tokens": 200, "output_tokens": 1000})
    both = ceiling_usd(Pipeline("p", "1", (first, second, handler)), {"text": "x" * 100}, SETTINGS)
    least = cost_usd("claude-opus-5-5", ZERO | {"input_tokens": 1000, "output_tokens": 500})
    assert both > one + 3 * least
    assert both < 1.0


def test_ceiling_is_not_known_where_a_price_is_not():
    """One model without a price leaves the sum unknown."""
    agent = Agent("first", model="claude-of-tomorrow", prompt=PROMPT)
    assert ceiling_usd(Pipeline("p", "1", (agent,)), {}, SETTINGS) is None
