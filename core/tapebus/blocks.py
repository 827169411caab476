"""Blocks of the tape: checksum, packing and the correlation index, for stores and readers."""

from __future__ import annotations

from tapebus._blocks import (
    MAX_WAIT_S,
    BlockView,
    corr_hash,
    crc32c,
    find_corr,
    find_segmented,
    join_payload,
    merge_payloads,
    merge_runs,
    segment_table,
    sort_run,
    split_payload,
    topic_counts,
    topics_at,
)

__all__ = [
    "MAX_WAIT_S",
    "BlockView",
    "corr_hash",
    "crc32c",
    "find_corr",
    "find_segmented",
    "join_payload",
    "merge_payloads",
    "merge_runs",
    "segment_table",
    "sort_run",
    "split_payload",
    "topic_counts",
    "topics_at",
]
