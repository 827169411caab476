"""Break a promise on purpose and see a test turn red: ``make sabotage``, or ``sabotage.py NAME …`` for some.

Each sabotage replaces one piece of text in a copy of the tree, compiles what has to be compiled and runs the tests that
should notice. A sabotage that no test notices is a hole in the tests; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from sabotages import SABOTAGES, Sabotage  # noqa: E402

#: What `pytest` answers when tests ran and some of them failed.
TESTS_FAILED = 1


class Copy:
    """A private copy of the working tree, compiled modules included."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "tapebus"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
        compiled = [path.relative_to(ROOT) for path in (ROOT / "core" / "tapebus").glob("*.so")]
        translated = [path.relative_to(ROOT) for path in (ROOT / "build" / "cython").rglob("*.c")]
        for name in [*map(Path, filter(None, tracked.decode().split("\0"))), *compiled, *translated]:
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        if (shared := ROOT.parent / "shared").exists():
            (directory / "shared").symlink_to(shared)
        self.environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root / "core"), str(self.root / "plugins")]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def apply(self, sabotage: Sabotage) -> None:
        path = self.root / sabotage.file
        text = path.read_text()
        if text.count(sabotage.old) != 1:
            raise SystemExit(f"{sabotage.name}: its text is not in {sabotage.file} exactly once")
        self._whole = text
        path.write_text(text.replace(sabotage.old, sabotage.new))
        self._compile(sabotage)

    def restore(self, sabotage: Sabotage) -> None:
        (self.root / sabotage.file).write_text(self._whole)
        self._compile(sabotage)

    def _compile(self, sabotage: Sabotage) -> None:
        if sabotage.file.endswith((".pyx", ".pxd")):
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(command, cwd=self.root, env=self.environ, check=True, capture_output=True)

    def test(self, tests: list[str]) -> tuple[int, str]:
        """The exit code of pytest and the first test that failed."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rfE", *tests]
        done = subprocess.run(command, cwd=self.root, env=self.environ, capture_output=True, text=True, check=False)
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return done.returncode, found.group(1) if found else done.stdout[-2000:] + done.stderr[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these sabotages")
    parser.add_argument("--list", action="store_true", help="say what there is and end")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - {each.name for each in SABOTAGES}:
        parser.error(f"no such sabotage: {', '.join(sorted(unknown))}")
    sabotages = [each for each in SABOTAGES if not chosen.names or each.name in chosen.names]
    if chosen.list:
        for each in sabotages:
            print(f"{each.name:<28} {each.why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="tb-sabotage-") as directory:
        copy = Copy(Path(directory))
        code, first = copy.test(list(dict.fromkeys(test for each in sabotages for test in each.tests)))
        if code != 0:
            print(f"without any sabotage the tests must pass, but: {first}", file=sys.stderr)
            return 2
        caught = sum(_try(copy, each) for each in sabotages)
    print(f"{caught} of {len(sabotages)} sabotages caught")
    return 0 if caught == len(sabotages) else 1


def _try(copy: Copy, sabotage: Sabotage) -> bool:
    begun = time.monotonic()
    copy.apply(sabotage)
    code, first = copy.test(sabotage.tests)
    copy.restore(sabotage)
    caught = code == TESTS_FAILED
    verdict = f"caught by {first}" if caught else "NOT CAUGHT" if code == 0 else f"the tests did not run:\n{first}"
    print(f"{sabotage.name:<28} {time.monotonic() - begun:5.1f} s  {verdict}", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main())
