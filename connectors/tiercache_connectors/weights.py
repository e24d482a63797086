"""Which weights an engine has loaded, from what it was told to load: the `model` and `revision` of a Layout.

Keys must tell any two models apart whose KV could differ, and a path says nothing of what lies there. A snapshot of a
hub is its name and commit. Any other directory is a digest of its configuration and of every byte of its weights, so
that all engines and hosts that load the same files find each other's blocks, wherever the files lie. Reading them once
is what that costs (the engine has just done so: they are in the page cache); who says `model` and `revision` avoids it.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from tiercache.errors import ConfigError

THREADS = 4
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Patterns of files with weights: the first that matches anything counts, for directories may have copies in others."""

CONFIGS = ("config.json", "adapter_config.json")
"""What else decides KV: of a model, and of an adapter (its scaling, say)."""

_SNAPSHOT = re.compile(r"/models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


class Weights(NamedTuple):
    """Fields of a Layout."""

    model: str
    revision: str = ""


def identify(model: str, revision: str = "") -> Weights:
    """Identity of a model by the name or directory that an engine was given, and the revision if one was.

    Raises ConfigError where it cannot be found out without asking a hub: then the user has to say it.
    """
    if not model:  # which as a path would be the working directory
        raise ConfigError("nobody says which model it is: say model= and revision= of the weights")
    path = Path(model)
    if path.is_dir():
        return _snapshot(path) or Weights(f"weights:{digest(path)}")
    if path.is_file():
        return Weights(f"weights:{_file_digest(path)}")
    if commit := _commit(model, revision):
        return Weights(model, commit)
    raise ConfigError(f"no snapshot of {model!r} is in the hub's cache: say model= and revision= of the weights")


def _snapshot(path: Path) -> Weights | None:
    found = _SNAPSHOT.search(os.fspath(path.absolute()))
    return Weights(found["name"].replace("--", "/"), found["commit"]) if found else None


def configuration(model: str, revision: str = "") -> dict[str, Any] | None:
    """What a model's `config.json` says, by the name or directory that an engine was given; None where it is not on
    this machine, or is not what it should be."""
    file = configuration_file(model, revision)
    try:
        facts = json.loads(file.read_bytes()) if file is not None else None
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def configuration_file(model: str, revision: str = "") -> Path | None:
    """Where a model's `config.json` would lie; None where that is nowhere here."""
    if not model:  # which as a path would be the working directory
        return None
    path = Path(model)
    return path / "config.json" if path.is_dir() else None if path.is_file() else _cached(model, revision)


def _cached(name: str, revision: str) -> Path | None:
    """The configuration of a hub's repository, in the hub's cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    # Looks at files alone; nobody is asked over the network.
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except HFValidationError:  # a directory that is not there, say
        return None
    return Path(found) if isinstance(found, str) else None


def _commit(name: str, revision: str) -> str:
    """The commit that a branch or tag of a hub's repository means here, from the hub's cache; empty if unknown."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    found = _cached(name, revision)
    snapshot = _snapshot(found.parent) if found is not None else None
    return snapshot.revision if snapshot else ""


def digest(directory: Path) -> str:
    """xxh3-128, in hex, over a directory's configuration and names, sizes and contents of its files with weights."""
    files = next((found for pattern in WEIGHTS if (found := sorted(directory.glob(pattern)))), [])
    if not files:
        raise ConfigError(f"{directory} holds no weights ({', '.join(WEIGHTS)}): say model= and revision= instead")
    hashed = xxhash.xxh3_128()
    for name in CONFIGS:
        if (config := directory / name).exists():
            hashed.update(config.read_bytes())
    with ThreadPoolExecutor(THREADS) as threads:
        for file, each in zip(files, threads.map(_file_digest, files)):
            hashed.update(f"\n{file.name} {each}".encode())
    told: str = hashed.hexdigest()
    return told


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    if not size:
        return "empty"
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        told: str = xxhash.xxh3_128_hexdigest(mapped)
    return f"{size}:{told}"
