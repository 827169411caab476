"""``python -m tapebus_demo``: the same as ``tapebus demo``."""

from tapebus_demo.cli import demo

demo(prog_name="tapebus demo")
