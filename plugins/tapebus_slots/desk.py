"""What the desk allows and knows: the limits of each user, the switches, facts of symbols, findings of statistics.

Fed with events, kept in a mapping of bytes that survives a restart. Decides nothing, emits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

from msgspec import UNSET, json

from tapebus.errors import ConfigError
from tapebus_slots import config as configuration
from tapebus_slots.config import FIRE_MODE, Config
from tapebus_slots.payload import get
from tapebus_slots.view import Known
from tapebus_trading.calibration import Curve
from tapebus_trading.sessions import hours
from tapebus_trading.symbols import Registry

_SWITCH = "kill_switch"
#: What a `user_action` may ask of the kill switch.
SWITCH = {"kill_switch_on": True, "kill_switch_off": False}
_MODE = "fire_mode:"
_PATTERNS = "patterns"
_CALIBRATION = "calibration"
_SYMBOLS = "symbols"


class Desk:
    """One for each bus, used on one thread. Raises `ConfigError` where a table of the configuration is wrong.

    `values` is ``[plugins.slots]``, `shared` is ``[shared]``, `state` is where the desk keeps what events told it.
    """

    def __init__(self, values: dict[str, Any], shared: Mapping[str, Any], state: MutableMapping[str, bytes]) -> None:
        self.config = configuration.load(values)
        self.symbols = Registry(shared, self.config.symbols, "plugins.slots.symbols")
        self.hours = hours(shared)
        self.kill_switch = state.get(_SWITCH) == b"on"
        self._values = values
        self._state = state
        self._modes = {key[len(_MODE) :]: json.decode(state[key]) for key in state if key.startswith(_MODE)}
        self._disabled: list[str] = json.decode(state.get(_PATTERNS, b"[]"))
        self._curve = _curve(json.decode(state.get(_CALIBRATION, b"[]")))
        self.symbols.restore(json.decode(state.get(_SYMBOLS, b"{}")))
        self._configs: dict[str, Config] = {}
        #: Event type to what it changes, for the events that concern no user's slots.
        self.handlers: dict[str, Callable[[Any], None]] = {
            "pattern_status": self.on_pattern_status,
            "calibration": self.on_calibration,
            "symbol_specification": self.on_specification,
        }

    def config_of(self, user: str) -> Config:
        """What holds for `user`: the configuration, its tier, its own table, its last fire mode."""
        found = self._configs.get(user)
        if found is None:
            mode = self._modes.get(user)
            try:
                found = configuration.for_user(self._values, self.config, user, mode)
            except ConfigError:
                # a mode of before that the configuration of today contradicts: the configuration holds
                found = configuration.for_user(self._values, self.config, user)
            self._configs[user] = found
        return found

    def watchers(self, owner: str) -> list[str]:
        """Who a signal that names no user is judged for: `owner`, and everybody else who lets signals be fired."""
        others = sorted((self.config.users.keys() | self._modes.keys()) - {owner})
        return [owner, *(user for user in others if self.config_of(user).auto_fire)]

    def known(self, *accounts: str, lateness: float | None = None) -> Known:
        """What the gate is told besides quotes and slots, for a user who trades on `accounts`; see `Known`."""
        return Known(
            self.symbols,
            self.symbols.broker_of(*accounts),
            self.kill_switch,
            self._disabled,
            self._curve,
            self.hours,
            lateness,
        )

    def on_fire_mode(self, event: Any, user: str) -> None:
        """New limits of `user`; what the event leaves out stays. Raises `ConfigError` where they make no sense."""
        said = {name: value for name in FIRE_MODE if (value := get(event.data, name)) not in (None, UNSET)}
        mode = self._modes.get(user, {}) | said
        self._configs[user] = configuration.for_user(self._values, self.config, user, mode)
        self._modes[user] = mode
        self._state[_MODE + user] = json.encode(mode)

    def switch(self, action: str) -> bool:
        """Obey a ``user_action``; True where it moved the kill switch."""
        wanted = SWITCH.get(action, self.kill_switch)
        if wanted == self.kill_switch:
            return False
        self.kill_switch = wanted
        self._state[_SWITCH] = b"on" if wanted else b"off"
        return True

    def on_pattern_status(self, event: Any) -> None:
        """Only ``disabled`` stops a pattern: ``watch`` is a recommendation."""
        pattern = event.data.pattern_type
        disabled = event.data.status.lower() == "disabled"
        if disabled == (pattern in self._disabled):
            return
        self._disabled = [each for each in self._disabled if each != pattern] + [pattern] * disabled
        self._state[_PATTERNS] = json.encode(self._disabled)

    def on_calibration(self, event: Any) -> None:
        """A new fit replaces the last one; one whose knots do not ascend is no curve and is refused."""
        knots = [(float(stated), float(found)) for stated, found in event.data.knots]
        if any(later[0] < earlier[0] for earlier, later in pairwise(knots)):
            raise ValueError("calibration: the knots must ascend by stated confidence")
        self._curve = _curve(knots)
        self._state[_CALIBRATION] = json.encode(knots)

    def on_specification(self, event: Any) -> None:
        """The broker's own facts; a figure that makes no sense is refused and changes nothing."""
        self.symbols.specify(event.data)
        self._state[_SYMBOLS] = json.encode(self.symbols.specifications())


def _curve(knots: list[tuple[float, float]]) -> Curve | None:
    return Curve(knots) if knots else None
