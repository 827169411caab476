"""Errors a user of tapebus may see: each says what, where and what to do."""

from __future__ import annotations


class TapebusError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(TapebusError):
    """The command or call was used wrongly."""

    exit_code = 2


class StoreError(TapebusError):
    """The store failed to read or write; nothing after it may be acknowledged."""

    exit_code = 74


class StoreFull(StoreError):
    """The disk or the map is full: a state, not a crash. The same commit may be tried again later."""


class CorruptError(StoreError):
    """Stored bytes do not match their checksum; the message names the ``bus_seq`` range."""


class ConfigError(TapebusError):
    """The configuration is wrong; the message names the key, the value and the nearest valid one."""

    exit_code = 78


class PluginError(ConfigError):
    """A plugin cannot be loaded or wired: unknown, without hooks, or with a cyclic ``after=``."""


class BusNotRunning(TapebusError):
    """No bus answers on this data directory."""
