"""What confidence was worth, and what a curve fitted on the past makes of it later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from tapebus_trading.calibration import Score, fit, score

if TYPE_CHECKING:
    from tapebus_analytics.report import Report

#: The part of the trades, by time, that a curve is fitted on; the rest judges it.
PAST = 0.7


def calibration(report: Report, fitted: Any) -> dict[str, Any]:
    """The score of stated confidence; the same before and after a curve of the past, over later trades; `fitted` is the
    newest ``calibration`` on the tape."""
    split = int(len(report.sequence) * PAST)
    past, later = report.sequence[:split], report.sequence[split:]
    curve = fit(counted(past))
    return {
        "stated": plain(score(report.counts)),
        "later": {
            "method": curve.method,
            "fitted_on": curve.n,
            "stated": plain(score(counted(later)), bins=False),
            "calibrated": plain(score(counted((curve.apply(c), win) for c, win in later)), bins=False),
        },
        "in_force": None if fitted is None else msgspec.to_builtins(fitted),
    }


def counted(trades: Iterable[tuple[float, bool]]) -> dict[float, tuple[int, int]]:
    """Trades by confidence, as `tapebus_trading.calibration` takes them."""
    counts: dict[float, tuple[int, int]] = {}
    for confidence, win in trades:
        wins, n = counts.get(confidence, (0, 0))
        counts[confidence] = (wins + win, n + 1)
    return counts


def plain(found: Score | None, bins: bool = True) -> dict[str, Any] | None:
    """A score as plain values."""
    if found is None:
        return None
    about = {key: getattr(found, key) for key in ("n", "base_rate", "brier", "reference", "skill", "ece")}
    if bins:
        about["bins"] = [{**msgspec.structs.asdict(each), "high": each.high} for each in found.bins]
    return about
