"""The tape on LMDB: `tapebus_open_store` for tapebus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapebus import hookimpl

if TYPE_CHECKING:
    from tapebus_store.reader import LmdbReader
    from tapebus_store.writer import LmdbStore, StoreConfig

__all__ = ["LmdbReader", "LmdbStore", "StoreConfig", "tapebus_open_store"]

#: Loaded when asked for: the child that looks at a tape before it is opened needs little of it.
_LAZY = {"LmdbReader": "reader", "LmdbStore": "writer", "StoreConfig": "writer"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


@hookimpl
def tapebus_open_store(data_dir: Path, config: dict[str, Any], readonly: bool) -> LmdbReader:
    """Open the tape under ``data_dir/"tape"``; a writer also takes the lock on `data_dir`."""
    from tapebus_store.reader import LmdbReader
    from tapebus_store.writer import LmdbStore, store_config

    settings = store_config(config)
    return LmdbReader(Path(data_dir)) if readonly else LmdbStore(Path(data_dir), settings)
