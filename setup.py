"""The compiled modules, and nothing else: metadata, packages and entry points live in pyproject.toml.

Switches, read from the environment: TAPEBUS_TRACE=1 (line tracing for coverage of .pyx),
TAPEBUS_ANNOTATE=1 (HTML with the C of each line in build/cython), TAPEBUS_SANITIZE=1 (address and
undefined-behaviour sanitizers; run by ``make asan``).
"""

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODULES = (
    *("_topics", "_scan_json", "_scan_msgpack", "_scan", "_blocks", "_libzmq", "_ring"),
    *("_rights", "_sessions", "_intake", "_push", "_ingest"),
    *("_decode", "_bands", "_outbox", "_emitter", "_line"),
)

TRACE, ANNOTATE, SANITIZE = (bool(os.environ.get(f"TAPEBUS_{name}")) for name in ("TRACE", "ANNOTATE", "SANITIZE"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]


def extension(name: str) -> Extension:
    return Extension(
        f"tapebus.{name}",
        [f"core/tapebus/{name}.pyx"],
        include_dirs=["core/tapebus"],
        define_macros=[("CYTHON_TRACE_NOGIL", "1")] if TRACE else [],
        extra_compile_args=["-O1", "-g", *SANITIZERS] if SANITIZE else ["-O3"],
        extra_link_args=SANITIZERS if SANITIZE else [],
    )


class BuildExtensions(build_ext):
    """Translates the .pyx files just before compiling them, so that metadata and sdist never need to."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        from Cython.Build import cythonize

        translated = cythonize(
            self.extensions,
            include_path=["core"],
            # Coverage of .pyx wants the C beside its source; otherwise core/ stays clean.
            build_dir=None if TRACE else "build/cython",
            annotate=ANNOTATE,
            compiler_directives={"language_level": 3, "linetrace": TRACE},
        )
        for ours, theirs in zip(self.extensions, translated, strict=True):
            ours.sources = theirs.sources
        super().build_extensions()


setup(ext_modules=[extension(name) for name in MODULES], cmdclass={"build_ext": BuildExtensions})
