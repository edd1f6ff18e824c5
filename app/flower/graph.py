"""Where a run's agents stand in its picture: a column for each depth, dependencies to the left. Pure.

The template draws it as SVG, so that every text passes its escaping.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NODE_WIDTH_PX, NODE_HEIGHT_PX = 168, 50
ROW_PX = NODE_HEIGHT_PX + 34
GAP_PX = 72
MARGIN_PX = 32
DIAMOND_PX = 18  # a gate's, from the node, where the edges come in

# What stands in a cell: an agent, or, by its first agent, an edge on its way through a column.
_Cell = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class Node:
    """An agent. `x` and `y` are its upper left corner; its edges come in at the middle of its left side."""

    agent: str
    x: float
    y: float

    @property
    def middle(self) -> float:
        return self.y + NODE_HEIGHT_PX / 2


@dataclass(frozen=True, slots=True)
class Edge:
    """From an agent to one that depends on it. `path` is that of an SVG path."""

    source: str
    target: str
    path: str


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    width: int
    height: int


def layout(depends_on: Mapping[str, Sequence[str]]) -> Graph:
    """The picture of agents, dependencies first, each with those that it depends on."""
    depths: dict[str, int] = {}
    for agent, others in depends_on.items():
        depths[agent] = 1 + max((depths[other] for other in others), default=-1)
    columns = _columns(depends_on, depths)
    height = max(map(len, columns)) * ROW_PX
    places: dict[tuple[_Cell, int], tuple[float, float]] = {}
    for depth, column in enumerate(columns):
        x = MARGIN_PX + depth * (NODE_WIDTH_PX + GAP_PX)
        top = (height - len(column) * ROW_PX) / 2
        for row, cell in enumerate(column):
            places[cell, depth] = (x, top + row * ROW_PX + (ROW_PX - NODE_HEIGHT_PX) / 2)
    nodes = tuple(Node(agent, *places[(agent, False), depths[agent]]) for agent in depends_on)
    edges = tuple(
        Edge(other, agent, _path(_stops(other, agent, depths, places)))
        for agent, others in depends_on.items()
        for other in others
    )
    return Graph(nodes, edges, len(columns) * (NODE_WIDTH_PX + GAP_PX) - GAP_PX + 2 * MARGIN_PX, height)


def _columns(depends_on: Mapping[str, Sequence[str]], depths: Mapping[str, int]) -> list[list[_Cell]]:
    """The cells of each depth, ordered by where their edges come from, so that few edges cross."""
    columns: list[dict[_Cell, list[_Cell]]] = [{} for _ in range(max(depths.values()) + 1)]
    for agent, others in depends_on.items():
        columns[depths[agent]].setdefault((agent, False), [])
        for other in others:
            # An edge that skips a column has a cell of its own there: it must not run behind another agent.
            before: _Cell = (other, False)
            for depth in range(depths[other] + 1, depths[agent]):
                columns[depth].setdefault((other, True), [before])
                before = (other, True)
            columns[depths[agent]][agent, False].append(before)
    ordered: list[list[_Cell]] = []
    rows: dict[_Cell, float] = {}
    for column in columns:
        cells = sorted(
            column, key=lambda cell: sum(rows[before] for before in column[cell]) / max(1, len(column[cell]))
        )
        rows |= {cell: row - len(cells) / 2 for row, cell in enumerate(cells)}
        ordered.append(cells)
    return ordered


def _stops(
    source: str, target: str, depths: Mapping[str, int], places: Mapping[tuple[_Cell, int], tuple[float, float]]
) -> list[tuple[float, float]]:
    """The points of an edge, in pairs: where it leaves a column, and where it reaches the next one."""
    cells: list[_Cell] = [(source, False)]
    cells += [(source, True)] * (depths[target] - depths[source] - 1) + [(target, False)]
    found = []
    for depth, cell in enumerate(cells, depths[source]):
        x, y = places[cell, depth]
        middle = y + NODE_HEIGHT_PX / 2
        found += [(x, middle), (x + NODE_WIDTH_PX, middle)]
    return found[1:-1]


def _path(stops: Sequence[tuple[float, float]]) -> str:
    """Curves between columns, straight lines through them."""
    parts = [f"M{stops[0][0]:g} {stops[0][1]:g}"]
    for (x0, y0), (x1, y1) in zip(stops[::2], stops[1::2], strict=True):
        bend = (x1 - x0) / 2
        if len(parts) > 1:
            parts.append(f"L{x0:g} {y0:g}")
        parts.append(f"C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}")
    return "".join(parts)
