"""Builds the native kernel into the wheel where there is a C compiler; without one the wheel does without, slower."""

from __future__ import annotations

import hashlib
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
FOLDER = "tiercache/native"
SOURCES = ("kernel.c", "body.h")
LIBRARY = "_kernel.so"
COMPILE_S_MAX = 300


class KernelHook(BuildHookInterface[Any]):
    """`tiercache/native/kernel.c` -> `_kernel.so` beside it: a plain library for ctypes, the same for every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, also an editable one."""
        self.work = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        try:
            library = self._compiled(Path(self.work.name) / LIBRARY)
            if version == "editable":
                self._put(library)
                return
        except (OSError, subprocess.SubprocessError) as fault:
            why = getattr(fault, "stderr", "") or fault
            self.app.display_warning(f"tiercache is built without its native kernel, and will be slower: {why}")
            return
        build_data["force_include"][str(library)] = f"{FOLDER}/{LIBRARY}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is made."""
        self.work.cleanup()

    def _compiled(self, target: Path) -> Path:
        folder = Path(self.root) / FOLDER
        if not sys.platform.startswith("linux"):
            raise OSError(f"it is made for Linux, not for {sys.platform}")
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
        source = hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
        command = [*compiler, *FLAGS, f'-DSOURCE="{source}"', "-o", str(target), str(folder / SOURCES[0])]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S_MAX)
        return target

    def _put(self, library: Path) -> None:
        """Into the tree, for environments that use it as it is; processes that have an older one mapped keep that."""
        folder = Path(self.root) / FOLDER
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            shutil.copy(library, beside)
            (Path(beside) / LIBRARY).replace(folder / LIBRARY)
