"""What calls cost, in US dollars, by the prices that genai-prices carries: nothing is looked up over the network."""

from collections.abc import Mapping

from app.agents.requests import DATA_RULE, appended
from app.pipelines import templates
from app.pipelines.model import Agent, Json, Pipeline, canonical_json
from app.pipelines.names import RUN_NAMES
from app.settings import Settings

# Tags around data, and what the API itself adds to a request with a schema.
_OVERHEAD_TOKENS = 1_000


def cost_usd(model: str, usage: Mapping[str, int]) -> float | None:
    """The price of one call, `usage` as in Answer. None where it is not known, which is not the same as nothing."""
    from genai_prices import Usage, calc_price

    try:
        price = calc_price(
            Usage(
                input_tokens=usage["input_tokens"],
                cache_read_tokens=usage["cache_read_tokens"],
                cache_write_tokens=usage["cache_creation_tokens"],
                output_tokens=usage["output_tokens"],
            ),
            model,
            provider_id="anthropic",
        )
    except (LookupError, ValueError):
        return None
    return float(price.total_price)


def ceiling_usd(pipeline: Pipeline, run_input: Json, settings: Settings) -> float | None:
    """The most that one run's models can cost if every attempt is used and every answer is as long as it may be.

    Known before the first call. Attempts that dead workers leave behind come on top. None where a price is unknown.
    """
    total_usd = 0.0
    for agent in pipeline.agents:
        if agent.model is None:
            continue
        usage = {
            "input_tokens": _input_max_tokens(agent, pipeline, run_input, settings),
            "output_tokens": agent.max_tokens,
            "cache_read_tokens": 0,
            "cache_creation_tokens": 0,
        }
        one_usd = cost_usd(settings.model_aliases.get(agent.model, agent.model), usage)
        if one_usd is None:
            return None
        total_usd += one_usd * agent.retry_policy.max_attempts
    return total_usd


def _input_max_tokens(agent: Agent, pipeline: Pipeline, run_input: Json, settings: Settings) -> int:
    """No token is shorter than a byte, and no model's output has more tokens than its `max_tokens`."""
    assert agent.prompt is not None
    parts = templates.parse(agent.prompt.user)
    shown = [path[0] for path in templates.paths(parts) if path[0] not in RUN_NAMES]
    texts = (agent.prompt.system, DATA_RULE, agent.prompt.user, canonical_json(agent.schema))
    tokens = _OVERHEAD_TOKENS + sum(_size_bytes(text) for text in texts)
    for name in (*shown, *appended(agent.inputs, parts)):
        if name == "input":
            tokens += _size_bytes(canonical_json(run_input))
        else:
            source = pipeline.by_id[name]
            tokens += source.max_tokens if source.model else settings.output_max_bytes
    return tokens


def _size_bytes(text: str) -> int:
    return len(text.encode())
