"""Run inside a directory that holds nothing but an unpacked wheel: is everything in it?"""

import importlib
import sys
from importlib.metadata import distribution
from pathlib import Path

here = Path.cwd()
wheel = distribution("tapebus")
files = [str(file) for file in wheel.files or ()]
problems = [f"{file} does not belong in the wheel" for file in files if file.endswith((".pyx", ".c", ".h"))]
compiled = sorted({Path(file).name.split(".")[0] for file in files if file.endswith(".so")})
plugins = [point for point in wheel.entry_points if point.group == "tapebus.plugins"]
for name in ["tapebus", *(f"tapebus.{module}" for module in compiled), *(point.value for point in plugins)]:
    module = importlib.import_module(name)
    if not Path(str(module.__file__)).is_relative_to(here):
        problems.append(f"{name} was imported from {module.__file__}")
if "tapebus/py.typed" not in files:
    problems.append("tapebus/py.typed is missing")
for problem in problems:
    print(f"wheel: {problem}", file=sys.stderr)
if problems:
    sys.exit(1)
print(f"wheel: {wheel.version}, {len(compiled)} compiled modules, {len(plugins)} plugins, all imported from the wheel")
