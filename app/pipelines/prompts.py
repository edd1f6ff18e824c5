"""The format of `prompts/<agent>.md`: two headings, `# System` and `# User`, each with its text below it.

The system part is fixed text. The user part may hold variables: `{{input.issue}}`, `{{coder.diff}}`, whole objects as
`{{input}}` or `{{coder}}`, and `{{run_id}}`, `{{agent}}`, `{{pipeline}}`.
"""

import re
from dataclasses import dataclass

from app.pipelines.model import Prompt
from app.pipelines.report import Place, Unreadable, place_of
from app.pipelines.yaml_source import unstorable

_HEADING = re.compile(r"^# (System|User)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt, and where in the file's text its user part begins."""

    prompt: Prompt
    text: str
    user_at: int

    def place(self, offset: int) -> Place:
        """The place in the file of a character of the user part."""
        return place_of(self.text, self.user_at + offset)


def parse(text: str) -> PromptText:
    """The parts of a prompt file. Raises Unreadable."""
    bad = unstorable(text)
    if bad is not None:
        raise Unreadable(place_of(text, bad), "holds a NUL, which cannot be stored.")
    headings = list(_HEADING.finditer(text))
    if [heading[1] for heading in headings] != ["System", "User"]:
        place = place_of(text, headings[0].start()) if headings else (1, 1)
        raise Unreadable(place, "needs the headings '# System' and '# User', each once and in this order.")
    system_heading, user_heading = headings
    if text[: system_heading.start()].strip():
        raise Unreadable((1, 1), "has text above '# System', which belongs to no part.")
    system = text[system_heading.end() : user_heading.start()]
    user = text[user_heading.end() :]
    for heading, part in ((system_heading, system), (user_heading, user)):
        if not part.strip():
            raise Unreadable(place_of(text, heading.start()), f"has nothing below '# {heading[1]}'.")
    braces = system.find("{{")
    if braces >= 0:
        place = place_of(text, system_heading.end() + braces)
        raise Unreadable(place, "has a variable in its system part: only the user part may hold one.")
    user_at = user_heading.end() + len(user) - len(user.lstrip())
    return PromptText(Prompt(system.strip(), user.strip()), text, user_at)
