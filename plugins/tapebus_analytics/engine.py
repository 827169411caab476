"""What the bus learns from outcomes as they come: the status of patterns and the calibration of confidence.

Runs on a thread of its own, so that a fit never holds up the dispatcher. Everything follows from events and their
times, nothing from the clock: the same tape gives the same events again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tapebus.consumer import Context
from tapebus_analytics.clusters import Clusters, kind_of
from tapebus_analytics.config import load
from tapebus_analytics.elimination import Pattern, Trial, figures, judge, reason
from tapebus_trading.calibration import Curve, fit, score

TOPICS = ("signal_generated", "signal_outcome", "user_action")
#: Patterns beyond so many share one record: names may come from anywhere.
MOST_PATTERNS = 500
OTHERS = "(other)"
_ACTIONS = {"pattern_on": "active", "pattern_off": "disabled", "pattern_auto": None}

_encode = msgspec.msgpack.Encoder().encode
_decode_pattern = msgspec.msgpack.Decoder(Pattern).decode
_decode_place = msgspec.msgpack.Decoder(tuple[float, bool]).decode
_decode_count = msgspec.msgpack.Decoder(tuple[int, int]).decode


class Fitted(msgspec.Struct):
    """The newest calibration and how many decided trades there were and are."""

    version: int = 0
    at: int = 0
    seen: int = 0
    repeats: int = 0
    skill: float | None = None


_decode_fitted = msgspec.msgpack.Decoder(Fitted).decode


class Analyst:
    """Used on the consumer's thread; `metrics` on any.

    Keys of ``context.state``: ``p:<pattern>`` a record, ``n:<confidence in tenths>`` wins and trades, ``f`` the fit,
    ``s:<signal>`` whether an open signal counts, ``k:<symbol pattern direction>`` when one last came.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = load(context.config)
        self.clusters = Clusters(self.config.cluster_s)
        self.patterns: dict[str, Pattern] = {}
        self.counts: dict[int, tuple[int, int]] = {}
        self.fitted = Fitted()
        self._changed: set[str] = set()
        self._restore()

    def handle(self, batch: Any) -> None:
        for event in batch:
            kind = event.event_type
            if kind == "signal_generated":
                self.clusters.signal(event.data.signal_id, kind_of(event.data), event.timestamp)
            elif kind == "signal_outcome":
                self._outcome(event)
            elif event.data.action in _ACTIONS:
                self._user(event)

    # -- outcomes ---------------------------------------------------------------------------------

    def _outcome(self, event: Any) -> None:
        data = event.data
        if self.config.learn_from == "live" and data.origin is not None:
            return
        if not self.clusters.outcome(data.signal_id, kind_of(data), data.opened_at):
            self.fitted.repeats += 1
            self._changed.add("f")
            return
        if data.outcome not in ("WIN", "LOSS"):
            return
        win = data.outcome == "WIN"
        self._learn(data.confidence, win, event)
        pattern = self._pattern(data.pattern_type)
        trial = pattern.trial
        trial.add(win, data.risk_reward, self.config.breakeven)
        self._changed.add(f"p:{pattern.pattern_type}")
        status = judge(pattern, self.config, event.timestamp)
        if status == pattern.status:
            return
        if "disabled" in (status, pattern.status):
            # what was shown before a decision is no evidence for the next one
            pattern.trial = Trial()
        pattern.status, pattern.since = status, event.timestamp
        self._tell(pattern, trial, event)

    def _pattern(self, name: str) -> Pattern:
        if name not in self.patterns and len(self.patterns) >= MOST_PATTERNS:
            name = OTHERS
        return self.patterns.setdefault(name, Pattern(name))

    def _tell(self, pattern: Pattern, trial: Trial, event: Any) -> None:
        """Publish where a pattern stands, if that or who decided it is not what was published last."""
        now = (pattern.effective, pattern.by)
        if now == pattern.told:
            return
        pattern.told = now
        since = pattern.user_since if pattern.user_status else pattern.since
        about = {
            "pattern_type": pattern.pattern_type,
            "status": pattern.effective,
            "reason": reason(pattern, trial, self.config),
            **figures(trial),
            "by": pattern.by,
            "since": since,
        }
        self.context.emit("pattern_status", {k: v for k, v in about.items() if v is not None}, cause=event)

    def _user(self, event: Any) -> None:
        """A user's word outranks the rule until ``pattern_auto`` takes it back; the rule goes on judging meanwhile."""
        details = event.data.details or {}
        name = details.get("pattern_type") or details.get("pattern")
        if not isinstance(name, str) or not 0 < len(name) <= 100:
            self.context.log.warning("%s at bus_seq %d names no pattern_type", event.data.action, event.bus_seq)
            return
        # by its own name however many there are: the gate knows patterns by nothing else
        pattern = self.patterns.setdefault(name, Pattern(name))
        pattern.user_status = _ACTIONS[event.data.action]  # type: ignore[assignment]
        pattern.user = str(event.data.user_id or event.user_id)[:90]
        pattern.user_since = event.timestamp
        self._changed.add(f"p:{pattern.pattern_type}")
        self._tell(pattern, pattern.trial, event)

    # -- calibration ------------------------------------------------------------------------------

    def _learn(self, confidence: float, win: bool, event: Any) -> None:
        tenths = round(confidence * 10)
        wins, n = self.counts.get(tenths, (0, 0))
        self.counts[tenths] = (wins + win, n + 1)
        fitted = self.fitted
        fitted.seen += 1
        self._changed.update((f"n:{tenths}", "f"))
        if fitted.seen >= self.config.calibrate_from and fitted.seen - fitted.at >= self.config.refit_every:
            self._fit(event)

    def _fit(self, event: Any) -> None:
        """Publish a new version, made of what is past."""
        counts = {tenths / 10: each for tenths, each in self.counts.items()}
        judged = score(counts)
        assert judged is not None
        fitted = self.fitted
        fitted.version, fitted.at, fitted.skill = fitted.version + 1, fitted.seen, judged.skill
        curve: Curve = fit(counts, fitted.version)
        data = {
            "version": curve.version,
            "method": curve.method,
            "n": curve.n,
            "knots": [[round(x, 4), round(y, 4)] for x, y in curve.knots],
            "base_rate": judged.base_rate,
            "brier": judged.brier,
            "ece": judged.ece,
            "fitted_to": event.timestamp,
        }
        if judged.skill is not None:
            data["skill"] = judged.skill
        self.context.emit("calibration", data, cause=event)

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what changed since the last call."""
        state = self.context.state
        for key in self._changed:
            name = key[2:]
            if key == "f":
                state[key] = _encode(self.fitted)
            elif key[0] == "p":
                state[key] = _encode(self.patterns[name])
            else:
                state[key] = _encode(self.counts[int(name)])
        for key in self.clusters.changed:
            place = self.clusters.saved(key)
            if place is None:
                state.pop(key, None)
            else:
                state[key] = _encode(place)
        self._changed.clear()
        self.clusters.changed.clear()

    def _restore(self) -> None:
        places: dict[str, tuple[float, bool]] = {}
        for key, value in self.context.state.items():
            if key == "f":
                self.fitted = _decode_fitted(value)
            elif key.startswith("p:"):
                self.patterns[key[2:]] = _decode_pattern(value)
            elif key.startswith("n:"):
                self.counts[int(key[2:])] = _decode_count(value)
            else:
                places[key] = _decode_place(value)
        self.clusters.restore(places)

    # -- figures ----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, int | float | str]:
        """Patterns by status, trades learnt from, and the calibration in force."""
        found = [each.effective for each in list(self.patterns.values())]
        fitted = self.fitted
        about: dict[str, int | float | str] = {
            "patterns": len(found),
            "watch": found.count("watch"),
            "disabled": found.count("disabled"),
            "decided": fitted.seen,
            "repeats": fitted.repeats,
            "calibration": fitted.version,
        }
        if fitted.skill is not None:
            about["skill"] = round(fitted.skill, 4)
        return about

    def disabled(self) -> list[str]:
        """The patterns that may not fire."""
        return sorted(each.pattern_type for each in list(self.patterns.values()) if each.effective == "disabled")
