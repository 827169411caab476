"""Which plugins may be imported at all: those enabled, and, once a list is given, those that match their line in it.

Importing a package runs its code, so the decision is made on metadata and file contents alone. The built-in
plugins belong to the very distribution that is running and need no line.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import Distribution, EntryPoint

from msgspec import Struct

from tapebus.errors import PluginError

OWN = "tapebus"
#: Set, it keeps every plugin of another distribution out, whatever the configuration enables.
SWITCH = "TAPEBUS_NO_PLUGINS"


class Trusted(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of ``[plugins.trusted]``; an empty `version` or `sha256` is not compared."""

    dist: str
    version: str = ""
    sha256: str = ""


_list: Mapping[str, Trusted] | None = None


def enforce(trusted: Mapping[str, Trusted] | None) -> None:
    """From now on, in this whole process, import only what `trusted` lists; None trusts what is enabled."""
    global _list
    _list = trusted


def is_own(point: EntryPoint) -> bool:
    """Whether `point` is a built-in plugin."""
    return point.dist is not None and _normal(point.dist.name) == OWN and point.value == f"tapebus_{point.name}"


def switched_off(point: EntryPoint) -> bool:
    return bool(os.environ.get(SWITCH)) and not is_own(point)


def choose(name: str, points: Sequence[EntryPoint]) -> EntryPoint:
    """The one of `points`, all called `name`, to import. Raises `PluginError`; imports nothing."""
    if _list is not None:
        points = _listed(name, points)
    values = sorted({point.value for point in points})
    if len(values) > 1:
        raise PluginError(f"plugin {name!r} is claimed by both {values[0]} and {values[1]}: uninstall one of them")
    return points[0]


def _listed(name: str, points: Sequence[EntryPoint]) -> Sequence[EntryPoint]:
    own = [point for point in points if is_own(point)]
    if own:
        return own
    assert _list is not None
    wanted = _list.get(name)
    found = ", ".join(sorted({point.dist.name if point.dist is not None else "unknown" for point in points}))
    if wanted is None:
        raise PluginError(
            f"plugin {name!r} of {found} is not in [plugins.trusted] and was not imported: "
            "look at it, then add its line from `tapebus plugins --hashes`"
        )
    matching = [
        point for point in points if point.dist is not None and _normal(point.dist.name) == _normal(wanted.dist)
    ]
    if not matching:
        raise PluginError(f"plugin {name!r} comes from {found}, trusted is {wanted.dist}; it was not imported")
    for point in matching:
        assert point.dist is not None
        if wanted.version and point.dist.version != wanted.version:
            raise PluginError(
                f"plugin {name!r} has version {point.dist.version}, trusted is {wanted.version}; it was not imported"
            )
        if wanted.sha256 and fingerprint(point) != wanted.sha256:
            raise PluginError(
                f"plugin {name!r}: the files of {point.dist.name} {point.dist.version} are not the trusted ones; "
                "it was not imported"
            )
    return matching


def fingerprint(point: EntryPoint) -> str:
    """SHA-256 over names and contents of all files of the distribution of `point`, as they are now.

    Empty when its source is not among them, as with an editable installation.
    """
    dist = point.dist
    if dist is None or not _holds(dist, point):
        return ""
    digest = hashlib.sha256()
    for path in sorted(dist.files or (), key=str):
        if path.suffix == ".pyc" or path.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            continue
        try:
            content = path.read_binary()
        except OSError:
            content = b"missing"
        digest.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _holds(dist: Distribution, point: EntryPoint) -> bool:
    base = point.module.replace(".", "/")
    return any(str(path) in (f"{base}.py", f"{base}/__init__.py") for path in dist.files or ())


def line(point: EntryPoint) -> str:
    """The line of ``[plugins.trusted]`` for what is installed now."""
    assert point.dist is not None
    return (
        f'{point.name} = {{ dist = "{point.dist.name}", version = "{point.dist.version}", '
        f'sha256 = "{fingerprint(point)}" }}'
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
