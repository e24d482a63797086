"""What users install: the wheel's contents, its metadata, and that a bare install is light and works."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

from tiercache import native

ROOT = Path(__file__).resolve().parents[1]
BARE = {"numpy", "xxhash", "rocksdict", "fsspec"}

# Makes everything unfindable that neither Python nor a bare install brings.
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {sorted(BARE | {"tiercache", "tiercache_connectors"})}:
            return None
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(path)!r})\n" + textwrap.dedent(code),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as an installation would have it."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tiercache", "tiercache_connectors"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".part"))]
    built = [name for name in names if name.endswith(".so")]
    assert built == (["tiercache/native/_kernel.so"] if native.KERNEL is not None else [])
    assert {"tiercache/py.typed", "tiercache_connectors/py.typed"} <= set(names)
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("tiercache/**/*.py")}
    assert sources <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = next(site.glob("tiercache-*.dist-info")) / "METADATA"
    text = metadata.read_text()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    bare = [
        line.split(": ")[1] for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert {name.split(">")[0].split("<")[0] for name in bare} == BARE
    assert len(project["dependencies"]) == len(BARE)
    entries = (metadata.parent / "entry_points.txt").read_text()
    assert "tiercache = tiercache_connectors.fsspec_fs:TierCacheFileSystem" in entries
    assert "tiercache = tiercache.cli:main" in entries


def test_versions_agree(site: Path) -> None:
    result = python("import tiercache; print(tiercache.__version__)", site)
    assert f"tiercache-{result.stdout.strip()}.dist-info" in {path.name for path in site.glob("*.dist-info")}


def test_the_old_s3fs_is_refused() -> None:
    """Without the floor, pip beside a newer boto3 silently takes s3fs 0.4.2 of 2020."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [each for extra in extras.values() for each in extra if each.startswith("s3fs")]
    assert wanted
    assert all(each == "s3fs>=2026" for each in wanted)


def test_import_is_light(site: Path) -> None:
    """Names load at first use, so that `import tiercache` costs nothing to programs that may never cache."""
    heavy = [
        "numpy",
        "asyncio",
        "rocksdict",
        "fsspec",
        "prometheus_client",
        "torch",
        "pyarrow",
        "obstore",
        "rich",
        "typer",
    ]
    result = python(f"import tiercache; print([m for m in {heavy} if m in sys.modules], tiercache.__file__)", site)
    assert result.stdout.startswith("[] " + str(site)), result.stdout + result.stderr


MODULES = sorted(
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    for base in (ROOT, ROOT / "connectors")
    for top in ("tiercache", "tiercache_connectors")
    for path in (base / top).glob("**/*.py")
    if "testing" not in path.parts and path.name != "__main__.py"
)


HOSTED = ("tiercache_connectors.vllm_", "tiercache_connectors.sglang_")
"""Modules that engines load: some of them are classes of the engine's own kind, and cannot be without it."""


def test_a_bare_install_imports_every_module_but_the_command_line(site: Path) -> None:
    wanted = [name for name in MODULES if not name.startswith(("tiercache.cli", *HOSTED))]
    code = f"""
    import importlib
    for name in {wanted}:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(name, error)
    """
    result = python(BLOCKER + textwrap.dedent(code), site)
    assert (result.stdout, result.returncode) == ("", 0), result.stdout + result.stderr


def test_the_command_line_says_what_is_missing(site: Path) -> None:
    result = python(BLOCKER + "from tiercache.cli import main\nsys.argv = ['tiercache', 'config']\nmain()", site)
    assert result.returncode != 0
    assert "tiercache[cli]" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_a_bare_install_caches(site: Path, tmp_path: Path) -> None:
    """Memory, SSD and an fsspec origin, with nothing but the four dependencies."""
    code = """
    import fsspec, fsspec.implementations.local
    from tiercache_connectors.fsspec_fs import TierCacheFileSystem
    folder = sys.argv[1]
    with open(folder + "/x.bin", "wb") as file:
        file.write(bytes(range(256)) * 1000)
    import os
    os.utime(folder + "/x.bin", (1e9, 1e9))
    sizes = {"memory_bytes": "16MiB", "ssd_bytes": "16MiB"}
    fs = TierCacheFileSystem(target_protocol="file", directory=folder + "/cache", **sizes)
    for _ in range(2):
        assert fs.cat_file(folder + "/x.bin", 1000, 2000) == (bytes(range(256)) * 1000)[1000:2000]
    print("equal")
    """
    result = python(BLOCKER + textwrap.dedent(code), site, str(tmp_path))
    assert "equal" in result.stdout, result.stdout + result.stderr
