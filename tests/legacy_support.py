"""Lines of old logs, by shape, and a dry run of an import of them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tapebus.cli import main

FATES = ("mapped", "merged", "duplicate", "conflict", "remark", "refused")
AT = 1_757_000_000


def truth(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A line of the first log: no prices, and a lifespan of 0 throughout."""
    record = {
        "timestamp": "2025-09-04T15:33:20",
        "pair": "EURUSD",
        "pattern": "SWEEP_RETURN",
        "confidence": 83.5,
        "quality_score": 83.5,
        "win": True,
        "risk_reward": 1.5,
        "lifespan": 0,
        "session": "NEWYORK",
        "signal_id": f"ELITE_RAPID_EURUSD_{AT + number}",
        "direction": "BUY",
        "signal_class": "RAPID",
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def tracked(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A line of the log with prices: gold, sold at 3640.04, stopped out at 3643.22, pips in its own unit."""
    record = {
        "signal_id": f"ELITE_SNIPER_XAUUSD_{AT + number}",
        "timestamp": AT + 0.5,
        "pair": "XAUUSD",
        "pattern_type": "ORDER_BLOCK_BOUNCE",
        "pattern": "ORDER_BLOCK_BOUNCE",
        "direction": "SELL",
        "confidence": 76.1,
        "entry_price": 3640.04,
        "tp_price": 3637.24,
        "sl_price": 3643.04,
        "tp_pips": 28000.00000000182,
        "sl_pips": 30000.0,
        "session": "LATE_NY",
        "fired": False,
        "would_fire": True,
        "win": False,
        "outcome": "LOSS",
        "lifespan": 26.5,
        "pips_moved": -31799.999999998363,
        "current_price": 3643.22,
        "risk_reward": 0.93,
        "completion_reason": "SL_HIT",
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def record_44(**changes: Any) -> dict[str, Any]:
    """The documented tracking record; its time is its signal's, its duration that of an end 189.6 minutes later."""
    record = {
        "signal_id": "ELITE_RAPID_KALMAN_QUICKFIRE_1757993286",
        "symbol": "USDCNH",
        "direction": "BUY",
        "pattern_type": "KALMAN_QUICKFIRE",
        "confidence": 73.4,
        "outcome": "WIN",
        "pips_result": 19.0,
        "timestamp": 1757993290,
        "datetime": "2025-09-16T03:28:10.123456",
        "trade_duration_minutes": 189.6,
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def born(number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "signal_id": f"ELITE_GUARD_EURUSD_{AT + number}",
        "symbol": "EURUSD",
        "direction": "SELL",
        "entry_price": 1.1444500000000001,
        "sl": 1.14545,
        "tp": 1.14295,
        "confidence": 54,
        "pattern_type": "BOS_RETEST",
        "generated_at": "2025-09-04T15:33:20",
        "risk_reward": 1.5,
        "status": "pending",
        "completed": False,
    }
    return record | changes


def ended(number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "signal_id": f"ELITE_GUARD_EURUSD_{AT + number}",
        "status": "timeout_closed",
        "outcome": "timeout",
        "completed": True,
        "completed_at": "2025-09-04T17:38:20",
        "runtime_seconds": 7500,
        "exit_type": "timeout",
        "pips_result": 0,
    }
    return record | changes


def log(path: Path, *records: Any) -> str:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return str(path)


def dry_run(tmp_path: Path, *files: str, code: int | None = None) -> dict[str, Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        got = main(["import", "--data-dir", str(tmp_path / "none"), "--dry-run", "--json", *files])
    assert code is None or got == code
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
