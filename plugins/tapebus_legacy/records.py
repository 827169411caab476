"""The lines of an old log, whatever it is packed in: plain, gzip, zstandard, or standard input."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgspec

from tapebus.errors import UsageError

#: A longer line is no record; it is read past in pieces, so that no file can fill the memory with one.
LONGEST_LINE = 1 << 20
STDIN = "-"
_decode = msgspec.json.Decoder().decode


class Line(NamedTuple):
    """One line that is not blank: its number from 1, and the record in it or why there is none."""

    number: int
    record: dict[str, Any] | None
    problem: str = ""


class Log:
    """One file (or ``-``), read once by iterating over it; ``blank`` counts lines with nothing in them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = "standard input" if path == STDIN else os.path.basename(path)
        self.blank = self.lines = 0
        self._raw: BinaryIO | None = None
        self._size = 1

    @property
    def system(self) -> str:
        """What the log calls the program that wrote it: its name without endings."""
        return "stdin" if self.path == STDIN else self.name.split(".")[0] or self.name

    @property
    def fraction(self) -> float:
        """How much has been read."""
        try:
            return min(1.0, self._raw.tell() / self._size) if self._raw is not None else 0.0
        except (OSError, ValueError):  # a pipe, or closed
            return 0.0

    def __iter__(self) -> Iterator[Line]:
        try:
            with sys.stdin.buffer if self.path == STDIN else open(self.path, "rb") as raw:
                self._raw = raw
                if self.path != STDIN:
                    self._size = os.fstat(raw.fileno()).st_size or 1
                yield from self._parsed(_unpacked(raw))
        except (EOFError, zlib.error, _zstandard_error()) as error:
            raise UsageError(f"{self.path}: damaged after line {self.lines}: {error}") from None
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _parsed(self, stream: Any) -> Iterator[Line]:
        for text in _lines(stream):
            self.lines += 1
            if self.lines == 1 and text is not None:
                text = text.removeprefix(BOM_UTF8)
            if text is None:
                yield Line(self.lines, None, "longer than a record can be")
            elif not text.strip():
                self.blank += 1
            else:
                yield _parse(self.lines, text)


def _parse(number: int, text: bytes) -> Line:
    try:
        found = _decode(text)
    except (ValueError, RecursionError):
        return Line(number, None, "not JSON")
    return Line(number, found) if isinstance(found, dict) else Line(number, None, "not a JSON object")


def _lines(stream: Any) -> Iterator[bytes | None]:
    """Lines without their end; None for one that is too long."""
    while text := stream.readline(LONGEST_LINE + 1):
        if len(text) <= LONGEST_LINE or text.endswith(b"\n"):
            yield text
            continue
        while text and not text.endswith(b"\n"):
            text = stream.readline(LONGEST_LINE)
        yield None


def _unpacked(raw: BinaryIO) -> Any:
    """What is in `raw`, told by its first bytes and not by its name."""
    peekable: Any = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
    magic = peekable.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=peekable)
    if magic == b"\x28\xb5\x2f\xfd":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(peekable, read_across_frames=True)
        return io.BufferedReader(reader)
    return peekable


def _zstandard_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
