"""The account of an import: what became of every line. Nothing is dropped silently, so the sums add up."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tapebus_legacy.facts import REPAIRS

#: What a line can become. ``mapped``: an event of its own; ``merged``: part of another line's event; ``duplicate``:
#: said before, by a line or by the tape; ``conflict``: says otherwise than what counts already; ``remark``: tells
#: of no signal.
FATES = MAPPED, MERGED, DUPLICATE, CONFLICT, REMARKED, REFUSED = (
    "mapped",
    "merged",
    "duplicate",
    "conflict",
    "remark",
    "refused",
)
#: Lines shown of each kind.
EXAMPLES = 3


class Account:
    """What became of the lines of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines = self.blank = 0
        self.shapes: dict[str, Counter[str]] = {}
        self.repairs: dict[str, list[int]] = {}
        #: By fate, then reason: line and detail.
        self.reasons: dict[str, dict[str, list[tuple[int, str]]]] = {}
        #: Fields with a value that no event has a place for, by name.
        self.left_out: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def note(self, shape: str, fate: str, line: int, reason: str = "", detail: str = "") -> None:
        """One line of `shape` became `fate`."""
        self.shapes.setdefault(shape, Counter())[fate] += 1
        if reason:
            self.reasons.setdefault(fate, {}).setdefault(reason, []).append((line, detail))

    def repaired(self, names: set[str], line: int) -> None:
        for name in names:
            self.repairs.setdefault(name, []).append(line)

    def passed_over(self, record: dict[str, Any], read: frozenset[str]) -> None:
        """Note the fields of a line that are not read."""
        self.left_out.update(name for name, value in record.items() if value is not None and name not in read)

    @property
    def totals(self) -> Counter[str]:
        return sum(self.shapes.values(), Counter[str]())

    @property
    def balanced(self) -> bool:
        """Whether every line is accounted for."""
        return self.lines == self.blank + self.totals.total()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "file": self.name,
            "lines": self.lines,
            "blank": self.blank,
            **_fates(self.totals),
            "shapes": {shape: {"lines": found.total(), **_fates(found)} for shape, found in self.shapes.items()},
            "events": dict(self.events),
            "outcomes": dict(self.outcomes),
            "repaired": {
                name: {"count": len(lines), "means": REPAIRS[name], "lines": sorted(lines)[:EXAMPLES]}
                for name, lines in sorted(self.repairs.items(), key=lambda each: -len(each[1]))
            },
            "fields_left_out": dict(self.left_out.most_common(100)),
            **{fate: self._listed(fate) for fate in ("refused_because", "conflicts", "remarks")},
        }

    def _listed(self, key: str) -> dict[str, Any]:
        fate = {"refused_because": REFUSED, "conflicts": CONFLICT, "remarks": REMARKED}[key]
        return {
            reason: {
                "count": len(found),
                "lines": sorted(line for line, _ in found)[:EXAMPLES],
                "example": min(found)[1],
            }
            for reason, found in sorted(self.reasons.get(fate, {}).items(), key=lambda each: -len(each[1]))
        }


def _fates(found: Counter[str]) -> dict[str, int]:
    return {fate: found[fate] for fate in FATES}
