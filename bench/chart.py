"""The chart of bench/against.py, as SVG: a bar a side for its median, a line from its least to its most."""

from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, LINE, BAR = 760, 200, 90, 28, 16
OURS, THEIRS, INK, RANGE = "#0b6e4f", "#9aa5b1", "#1f2933", "#52606d"


def drawn(document: dict[str, Any]) -> str:
    parts: list[str] = []
    top = 8
    for row in document["rows"]:
        better = "more is better" if row["unit"] == "steps/s" else "less is better"
        parts.append(_text(8, top + 18, f"{row['title']}: {row['unit']}, {better}", weight="bold"))
        top += 30
        most = max((value for side in row["sides"] for value in side.get("values", ())), default=1.0)
        scale = (WIDTH - LEFT - RIGHT) / most
        for side in row["sides"]:
            parts.append(_text(LEFT - 8, top + 15, side["title"], anchor="end"))
            parts.append(_bar(side, top, scale))
            top += LINE
        top += 14
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif"'
        ' font-size="13">\n'
        f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _bar(side: dict[str, Any], top: int, scale: float) -> str:
    if "failed" in side:
        return _text(LEFT + 4, top + 15, "no figure")
    least, most = (LEFT + end(side["values"]) * scale for end in (min, max))
    colour = OURS if side["side"] == "stepfast" else THEIRS
    middle = top + 2 + BAR / 2
    return (
        f'<rect x="{LEFT}" y="{top + 2}" width="{side["median"] * scale:.1f}" height="{BAR}" fill="{colour}"/>'
        f'<path d="M{least:.1f} {middle}H{most:.1f}M{least:.1f} {middle - 4}v8M{most:.1f} {middle - 4}v8"'
        f' stroke="{RANGE}" stroke-width="1.5"/>' + _text(most + 8, top + 15, f"{side['median']:.1f}")
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"'
    return f'<text x="{x:.0f}" y="{y}" {style}>{escape(words)}</text>'
