"""The tape on LMDB: `tapebus_open_store` for tapebus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapebus import hookimpl
from tapebus_store.reader import LmdbReader
from tapebus_store.writer import LmdbStore, StoreConfig, store_config

__all__ = ["LmdbReader", "LmdbStore", "StoreConfig", "tapebus_open_store"]


@hookimpl
def tapebus_open_store(data_dir: Path, config: dict[str, Any], readonly: bool) -> LmdbReader:
    """Open the tape under ``data_dir/"tape"``; a writer also takes the lock on `data_dir`."""
    settings = store_config(config)
    return LmdbReader(Path(data_dir)) if readonly else LmdbStore(Path(data_dir), settings)
