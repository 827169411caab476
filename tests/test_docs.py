"""The documentation is true where a machine can tell: links, commands, byte tables, hooks and runnable examples."""

from __future__ import annotations

import inspect
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from tapebus import events, hookspecs, wire
from tapebus.config import Config
from tapebus_schema.catalog import default_types

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "build", "dist", ".git", "node_modules", ".pytest_cache"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not SKIPPED & set(p.relative_to(ROOT).parts))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WIRE = (ROOT / "docs" / "wire-format.md").read_text() if (ROOT / "docs" / "wire-format.md").exists() else ""
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "16 bytes": "16s"}

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


class Block(NamedTuple):
    """A fenced block: its language, the words after it and its text."""

    language: str
    words: list[str]
    text: str

    @property
    def file(self) -> str:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), "")


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(language, words.split(), text) for language, words, text in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# -- links, commands, tests ---------------------------------------------------------------------


@every_page
def test_every_local_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def command(words: list[str]) -> click.Command | None:
    """The command that `words` name, None when there is none; stops at the first word that is an argument."""
    from tapebus.cli import cli

    cli.list_commands(click.Context(cli, obj={}))  # plugins add theirs
    found: click.Command = cli
    for depth, word in enumerate(words):
        if not isinstance(found, click.Group) or not re.fullmatch(r"[a-z]+", word):
            break
        following = found.get_command(click.Context(found), word)
        if following is None:
            return None if depth == 0 or not found.invoke_without_command else found
        found = following
    return found


@every_page
def test_every_command_exists_with_the_options_shown(page: Path) -> None:
    shown = re.findall(r"`tapebus ([^`]+)`", prose(page))
    shown += [
        line.strip().removeprefix("$ ").removeprefix("tapebus ").split("  #")[0]
        for block in blocks(page)
        if block.language in ("", "sh", "bash", "console")
        for line in block.text.splitlines()
        if re.match(r"\s*(\$ )?tapebus [a-z]", line)
    ]
    wrong = []
    for line in shown:
        words = line.split()
        if not re.fullmatch(r"[a-z0-9]+", words[0]):
            continue  # an option of `tapebus` itself
        found = command(words)
        if found is None:
            wrong.append(line)
            continue
        known = {name for each in found.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
        wrong += [f"{line}: {word}" for word in re.findall(r"(?<!\S)--[a-z-]+", line) if word not in known]
    assert not wrong


@every_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = set(re.findall(r"`make ([a-z]+)", prose(page)))
    for block in blocks(page):
        if block.language in ("", "sh", "bash"):
            shown |= set(re.findall(r"^make ([a-z]+)", block.text, re.M))
    assert shown <= targets


@every_page
def test_every_test_that_is_named_exists(page: Path) -> None:
    for name, function in re.findall(r"`(?:tests/)?((?:faults/)?test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        file = ROOT / "tests" / name
        assert file.exists(), name
        assert not function or re.search(rf"^ *def {function}\(", file.read_text(), re.M), function


@every_page
def test_every_source_file_that_is_named_exists(page: Path) -> None:
    known = {path.name for path in ROOT.rglob("*.p*") if not SKIPPED & set(path.relative_to(ROOT).parts)}
    examples = {block.file for each in PAGES for block in blocks(each)}
    named = re.findall(r"`(?:[\w.]+/)*(_?[a-z_]+\.(?:pyx|pxd|py))`", prose(page))
    assert {name for name in named if name not in known | examples} == set()


def test_the_index_leads_to_every_page_of_the_directory() -> None:
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "docs/index.md").read_text())}
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - linked == {"index.md"}


# -- the wire -----------------------------------------------------------------------------------


def tables() -> dict[str, list[tuple[int, str]]]:
    """Offset and type of each field, by the name of the struct in wire.py."""
    found = {}
    for name, table in re.findall(r"<!-- struct: (\w+) -->\s*((?:\|.*\n)+)", WIRE):
        found[name] = [(int(at), kind) for at, kind in re.findall(r"^\| (\d+) \| ([^|]+?) \|", table, re.M)]
    return found


def test_each_byte_table_says_what_wire_py_packs() -> None:
    structs = {name: value for name, value in vars(wire).items() if isinstance(value, struct.Struct)}
    found = tables()
    assert set(found) == set(structs)
    for name, rows in found.items():
        at = 0 if name in ("HEAD", "S_REJECT") else wire.HEAD.size
        form = "<"
        for offset, kind in rows:
            assert offset == at, (name, kind)
            form += CODES[kind]
            at += struct.calcsize("<" + CODES[kind])
        expected = structs[name].format
        assert struct.Struct(form).size == structs[name].size
        assert re.sub(r"16s", "s", form) == re.sub(r"16s", "s", expected), name


def test_every_frame_type_and_code_is_described_with_its_number() -> None:
    for name in ("HELLO", "BATCH", "GAP", "PING", "BYE", "WELCOME", "ACK", "NACK", "PONG"):
        assert f"**{name}** ({getattr(wire, name)})" in WIRE
    for code, text in (*wire.PLACES.items(), *wire.REASONS.items()):
        assert f"| {code} | `{text}` |" in WIRE
    for name in ("SEQUENCE", "BUSY", "UNKNOWN", "CRC"):
        assert f"| {getattr(wire, f'NACK_{name}')} {name.lower()} |" in WIRE
    assert f"{wire.MAX_FRAME:,} bytes and {wire.MAX_BATCH_EVENTS:,} events" in " ".join(WIRE.split())


def test_the_envelope_table_lists_every_key() -> None:
    table = WIRE.split("| Key | Type |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == [*events.ENVELOPE_KEYS, "priority"]


def test_each_spelling_that_is_listed_is_accepted() -> None:
    aliases = {each.name: each.aliases for each in default_types()}
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (`.+`) \|$", WIRE, re.M)
    assert rows
    for event_type, field, listed in rows:
        assert set(re.findall(r"`(\w+)`", listed)) <= {a for a, f in aliases[event_type].items() if f == field}


def test_the_default_endpoints_are_the_documented_ones(tmp_path: Path) -> None:
    config = Config.defaults(tmp_path)
    for endpoint in (config.listen.feed, config.listen.ingest, config.acked_endpoints[0]):
        assert f"`{endpoint}`" in WIRE


# -- plugins ------------------------------------------------------------------------------------


def test_every_hook_has_a_section_with_its_parameters() -> None:
    page = (ROOT / "docs" / "writing-plugins.md").read_text()
    described = dict(re.findall(r"^### `(tapebus_\w+)\(([^)]*)\)`", page, re.M))
    specified = {
        name: ", ".join(inspect.signature(hook).parameters)
        for name, hook in vars(hookspecs).items()
        if name.startswith("tapebus_")
    }
    assert described == specified


# -- examples -----------------------------------------------------------------------------------

RUNNABLE = [page for page in PAGES if any("runnable" in block.words for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=[str(page.relative_to(ROOT)) for page in RUNNABLE])
def test_every_runnable_example_runs(
    page: Path, make_bus: Callable[..., object], free_ports: Callable[[int], list[int]], data_dir: Path
) -> None:
    """The blocks of a page in their order, each in a process of its own, all with one directory and one bus."""
    bus = make_bus().start()  # type: ignore[attr-defined]
    private = [f"tcp://127.0.0.1:{port}" for port in free_ports(3)]
    ports = {f"tcp://127.0.0.1:567{i}": endpoint for i, endpoint in enumerate(private)}
    ports |= dict(zip(("tcp://127.0.0.1:5570", "tcp://127.0.0.1:5571"), (bus.feed, bus.ingest), strict=True))
    environ = {**bus.environ(), "TAPEBUS_ENDPOINT": bus.acked, "TAPEBUS_DATA_DIR": str(bus.data_dir)}
    work = data_dir / "work"
    work.mkdir()
    for number, block in enumerate(blocks(page)):
        if "runnable" not in block.words and not block.file:
            continue
        text = block.text
        for documented, used in ports.items():
            text = text.replace(documented, used)
        file = work / (block.file or f"example_{number}.py")
        file.write_text(text)
        if "runnable" not in block.words:
            continue
        if "tapebus.toml" in text:
            environ.pop("TAPEBUS_DATA_DIR", None)  # a variable would win over the file
        run = subprocess.run(
            [sys.executable, str(file)], cwd=work, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == 0, f"{page.name}, block {number}:\n{text}\n{run.stdout}\n{run.stderr}\n{bus.output()}"
    assert bus.stop() == os.EX_OK
