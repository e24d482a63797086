"""Builds the native kernel into the wheel where there is a C compiler; without one the wheel does without, slower."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-O3", "-fPIC", "-shared", "-std=gnu11", "-Wall", "-Wextra")


class KernelHook(BuildHookInterface[Any]):
    """`tiercache/native/kernel.c` -> `_kernel.so` beside it: a plain library for ctypes, the same for every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, also an editable one."""
        folder = Path(self.root) / "tiercache" / "native"
        library = folder / "_kernel.so"
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
        with tempfile.TemporaryDirectory(dir=folder) as work:
            part = Path(work) / library.name
            try:
                command = [*compiler, *FLAGS, "-o", str(part), str(folder / "kernel.c")]
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as fault:
                why = getattr(fault, "stderr", "") or fault
                self.app.display_warning(f"tiercache is built without its native kernel, and will be slower: {why}")
                library.unlink(missing_ok=True)
                return
            part.replace(library)  # processes that have the old one mapped keep it
        build_data["artifacts"].append("/tiercache/native/_kernel.so")
        if sys.platform.startswith("linux"):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
