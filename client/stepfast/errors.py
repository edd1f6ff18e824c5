"""Every error that the client raises on purpose. What else the database raises passes unchanged.

StepfastError         one clear sentence, and the next step
├── Misuse            the caller must say something else
│   ├── UnknownName   no pipeline, run or agent of that name
│   ├── InvalidInput  no JSON object, too large, or not in the pipeline's input_schema
│   ├── KeyConflict   the key was used before, with another input
│   └── NotPossible   the run's state does not allow what was ordered
├── NotReady          the operator must start, migrate, allow or configure something
├── NotEnded          what was waited for did not end in time
└── RunFailed         the run ended without a result
"""

import re


class StepfastError(Exception):
    """`message` is one sentence of what is wrong; `next_step` is what to do about it (may be empty)."""

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()


class Misuse(StepfastError):
    pass


class UnknownName(Misuse):
    pass


class InvalidInput(Misuse):
    pass


class KeyConflict(Misuse):
    pass


class NotPossible(Misuse):
    pass


class NotReady(StepfastError):
    pass


class NotEnded(StepfastError, TimeoutError):
    pass


class RunFailed(StepfastError):
    """`state` is failed or cancelled."""

    def __init__(self, message: str, *, state: str, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.state = state


_MIGRATE = "Run: stepfast migrate"


class _Translation:
    """A class and not a generator: it is entered at every statement."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            _translate(error)


_translation = _Translation()


def translated() -> _Translation:
    """Turns what the database's functions refuse into the errors above."""
    return _translation


def _translate(error: Exception) -> None:
    said, state = _cause(error)
    sentence = said.strip().splitlines()[0] if said.strip() else type(error).__name__
    sentence = f"{sentence[:1].upper()}{sentence[1:]}."
    match state:
        case "SF001" | "SF004":
            raise UnknownName(sentence) from error
        case "SF002":
            raise KeyConflict(sentence, next_step="Use another key, or the same input.") from error
        case "SF003":
            raise InvalidInput(sentence) from error
        case "22P02" | "22P05":
            raise InvalidInput(f"Postgres cannot store the input: {sentence}") from error
        case "3F000" | "42P01" | "42883":
            raise NotReady("This database has no Stepfast.", next_step=_MIGRATE) from error
        case "55P03":
            raise NotReady(
                "Another transaction holds what this needs: the run, or its key.",
                next_step="Roll back, and try again once that one is committed.",
            ) from error
        case "42501":
            raise NotReady(sentence, next_step=f"{_MIGRATE} --client ROLE, or --operator ROLE.") from error
    if state and state.startswith("23"):
        # The driver's own text goes on with the row that was refused, in which the input stands.
        raise InvalidInput(f"Postgres refuses this: {sentence}") from None


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def check_text(what: str, value: str | None) -> None:
    """Refuses what Postgres keeps in no text, before a driver does. Raises InvalidInput."""
    if value is not None and _UNSTORABLE.search(value):
        raise InvalidInput(f"The {what} holds a NUL or half of a surrogate pair, which cannot be stored.")


def _cause(error: BaseException) -> tuple[str, str | None]:
    """The text and SQLSTATE of the driver's error, which frameworks wrap."""
    for candidate in (error, getattr(error, "orig", None), error.__cause__):
        state = getattr(candidate, "sqlstate", None)
        if state:
            # The driver's text goes on with the place in the function: CONTEXT.
            return str(getattr(getattr(candidate, "diag", None), "message_primary", None) or candidate), str(state)
    return str(error), None
