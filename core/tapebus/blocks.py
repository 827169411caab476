"""Blocks of the tape: checksum, packing and the correlation index, for stores and readers."""

from __future__ import annotations

from tapebus._blocks import (
    MAX_WAIT_S,
    BlockView,
    corr_hash,
    crc32c,
    find_corr,
    merge_payloads,
    merge_runs,
    sort_run,
    topic_counts,
)

__all__ = [
    "MAX_WAIT_S",
    "BlockView",
    "corr_hash",
    "crc32c",
    "find_corr",
    "merge_payloads",
    "merge_runs",
    "sort_run",
    "topic_counts",
]
