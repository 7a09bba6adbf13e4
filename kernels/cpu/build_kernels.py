"""Compiles the CPU kernels: setuptools' `build_ext` with several compilers at once.

setuptools compiles the sources of an extension one after another, and each level of the kernels
takes a compiler tens of seconds. Only the build uses this module.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """`build_ext` that compiles the sources of an extension in as many processes as cores."""

    def build_extension(self, ext: Extension) -> None:
        """Compile each source by itself, then link all objects as `build_ext` does."""

        def compile_source(source: str) -> list[str]:
            names: list[str] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            return names

        objects: list[str] = []
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for names in pool.map(compile_source, sorted(ext.sources)):
                objects += names
        ext.extra_objects = [*objects, *ext.extra_objects]
        ext.sources = []
        super().build_extension(ext)
