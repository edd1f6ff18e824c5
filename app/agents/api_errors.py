"""What a failed call of the API means, and who must act: the SDK's exceptions become ours."""

import math
import time
from email.utils import mktime_tz, parsedate_tz

import anthropic

from app.agents.work import Work
from app.errors import AccountProblem, AgentError, AuthorMistake, RateLimited, TimedOut, Unavailable
from app.settings import Settings

_TOLD_MAX_CHARS = 500
# A timeout this near to the deadline was the deadline's.
_NEAR_S = 0.1
# Behind these an account's owner stands, whatever the status (anthropic.types.shared; the 400s and 429s among them).
_ACCOUNT_CODES = frozenset(
    {
        "contract_spend_limit_reached",
        "enforced_spend_limit_reached",
        "cmek_key_disabled",
        "cmek_key_network_blocked",
        "organization_on_hold",
        "organization_type_not_supported",
        "parent_organization_required",
    }
)


def translate(error: anthropic.AnthropicError, work: Work, settings: Settings) -> AgentError:
    """The error that the attempt ends with. It never holds the key."""
    match error:
        case anthropic.APIStatusError():
            return _of_status(error, work, settings)
        case anthropic.APITimeoutError() if work.deadline.remaining_s() < _NEAR_S:
            return timed_out(work)
        case anthropic.APITimeoutError():
            return Unavailable("The API did not accept a connection in time.")
        case _:
            return Unavailable(f"The API could not be reached: {_cause(error, settings)}.")


def timed_out(work: Work) -> TimedOut:
    """What such a call cost is not known."""
    return TimedOut(f"{work.agent.id} had no complete answer within its timeout_ms, {work.agent.timeout_ms}.")


def _of_status(error: anthropic.APIStatusError, work: Work, settings: Settings) -> AgentError:
    told = _without_key(error.api_message or error.message, settings)
    status = error.status_code
    details: dict[str, object] = {
        "status": status,
        "type": error.type,
        "error_code": error.error_code,
        "request_id": error.request_id,
    }
    if error.error_code in _ACCOUNT_CODES:
        return _account_problem(f"The account cannot be used: {told}", work, details)
    failed: RateLimited | Unavailable
    match status:
        case 401 | 403:
            return _account_problem(f"The API refuses the key that ANTHROPIC_API_KEY holds ({told})", work, details)
        case 402:
            return _account_problem(f"The account cannot pay: {told}", work, details)
        case 400 | 404 | 413 | 422:
            return AuthorMistake(f"The API refuses the request of {work.agent.id}: {told}", details=details)
        case 429:
            failed = RateLimited(f"The API's rate limit is reached: {told}", details=details)
        case 408 | 409:
            failed = Unavailable(f"The API answered {status}: {told}", details=details)
        case _ if status >= 500:
            failed = Unavailable(f"The API answered {status}: {told}", details=details)
        case _:
            what = f"What answers at ANTHROPIC_BASE_URL is no Messages API (status {status}): {told}"
            return _account_problem(what, work, details)
    failed.retry_after_s = _retry_after_s(error, settings)
    return failed


def _account_problem(message: str, work: Work, details: dict[str, object]) -> AccountProblem:
    next_step = f"Mend it, restart the workers where a variable changed, then: stepfast resume {work.run_id}"
    return AccountProblem(message, next_step=next_step, details=details)


def _retry_after_s(error: anthropic.APIStatusError, settings: Settings) -> float | None:
    """The header's seconds, or its date, at most as long as the settings allow."""
    text = error.response.headers.get("retry-after", "")
    try:
        wish_s = float(text)
    except ValueError:
        date = parsedate_tz(text)
        if date is None:
            return None
        wish_s = mktime_tz(date) - time.time()
    return None if math.isnan(wish_s) else min(max(wish_s, 0.0), settings.retry_after_max_s)


def _cause(error: BaseException, settings: Settings) -> str:
    """What the innermost exception says: the SDK's own says "Connection error."."""
    for _ in range(10):
        if error.__cause__ is None:
            break
        error = error.__cause__
    return _without_key(str(error) or type(error).__name__, settings).rstrip(".")


def _without_key(text: str, settings: Settings) -> str:
    """A proxy's error page, or an error about a header, might show it."""
    key = settings.anthropic_api_key
    return (text.replace(key, "[redacted]") if key else text)[:_TOLD_MAX_CHARS]
