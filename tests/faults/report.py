"""The figures of the last fault runs as a Markdown table: ``python tests/faults/report.py >> docs/guarantees.md``.

Reads ``build/faults/figures.jsonl``, where every run adds its figures, and keeps the newest of the largest size of each
test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[2] / "build" / "faults" / "figures.jsonl"
SIZES = ("quick", "long", "full")


def newest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: dict[str, dict[str, Any]] = {}
    for record in records:
        before = kept.get(record["test"])
        if before is None or SIZES.index(record["size"]) >= SIZES.index(before["size"]):
            kept[record["test"]] = record
    return [kept[test] for test in sorted(kept)]


def shown(figures: dict[str, Any]) -> str:
    """Figures in one line; what is a text of its own (a table) is left out."""
    parts = []
    for key, value in figures.items():
        if isinstance(value, dict):
            parts.append(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items() if not isinstance(v, dict))}")
        elif not (isinstance(value, str) and "\n" in value):
            parts.append(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}")
    return "; ".join(parts)


def rows(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| Test | Run | Figures |", "|---|---|---|"]
    for record in records:
        file, _, name = record["test"].removeprefix("tests/faults/").partition("::")
        sentence = name.removeprefix("test_").replace("_", " ")
        verdict = "" if record["passed"] else "**failed**, "
        run = f"{verdict}{record['size']}, seed {record['seed']}, {record['seconds']} s, {record['at'][:10]}"
        lines.append(f"| {sentence} (`{file}`) | {run} | {shown(record['figures'])} |")
    return lines


def main() -> int:
    if not FIGURES.exists():
        print("no figures yet: run make faults", file=sys.stderr)
        return 1
    records = newest([json.loads(line) for line in FIGURES.read_text().splitlines()])
    machines = sorted({record["machine"] for record in records})
    print(
        f"Measured on {'; '.join(machines)}. Repeat one with `make faults SIZE=… ARGS='tests/faults/FILE --seed N'`.\n"
    )
    print("\n".join(rows(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
