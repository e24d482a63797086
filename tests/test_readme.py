"""README.md: its Python blocks run, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_blocks_run(tmp_path: Path) -> None:
    assert len(BLOCKS) == 4
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TIERCACHE_")}
    for block in BLOCKS:
        command = [sys.executable, "-c", block]
        result = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, block + result.stdout + result.stderr


def test_what_it_links_to_is_there() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ARCHITECTURE.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_every_extra_is_explained() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "README.md").read_text()
    assert [extra for extra in extras if f"`{extra}`" not in text] == []
