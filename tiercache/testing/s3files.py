"""Buckets and objects of the test S3 server as plain files below one directory.

A key is the file ROOT/bucket/key wherever a file can be that; keys that no path can say ("a/", "a//b", "..", "q" beside
"q/b", long names) lie flat in ROOT/.s3/odd/bucket. Files that were put there by hand are objects too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from collections.abc import Iterator

HIDDEN = ".s3"
ATTRIBUTE = "user.tiercache.s3"
NAME_BYTES_MAX = 255
KEY_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """One object as it lies: `etag` has its quotes, `file` is where the bytes are."""

    key: str
    file: Path
    size: int
    mtime_s: float
    etag: str
    content_type: str = "binary/octet-stream"
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Draft:
    """An object that is being written: bytes go to a private file, and appear at once when it is published."""

    file: Path
    stream: BinaryIO
    digest: hashlib._Hash
    size: int = 0

    def write(self, piece: bytes) -> None:
        """Appends a piece."""
        self.stream.write(piece)
        self.digest.update(piece)
        self.size += len(piece)

    def drop(self) -> None:
        """Forgets the draft."""
        self.stream.close()
        self.file.unlink(missing_ok=True)


class Files:
    """Buckets and objects below `root`. One thread uses it; other processes may add whole files at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._hidden = self.root / HIDDEN
        shutil.rmtree(self._hidden / "drafts", ignore_errors=True)
        (self._hidden / "drafts").mkdir(parents=True)
        (self._hidden / "odd").mkdir(exist_ok=True)
        self._serial = itertools.count()
        self._facts: dict[tuple[int, int, int], str] = {}

    def buckets(self) -> list[tuple[str, float]]:
        """(name, time of creation) of every bucket, by name."""
        found = [e for e in os.scandir(self.root) if e.is_dir() and e.name != HIDDEN]
        return sorted((e.name, e.stat().st_mtime) for e in found)

    def has_bucket(self, bucket: str) -> bool:
        """True when the bucket exists."""
        return bool(bucket) and not bucket.startswith(".") and (self.root / bucket).is_dir()

    def create_bucket(self, bucket: str) -> bool:
        """Creates a bucket; False when it was there or its name is none."""
        if bucket.startswith(".") or "/" in bucket or self.has_bucket(bucket):
            return False
        (self.root / bucket).mkdir()
        return True

    def delete_bucket(self, bucket: str) -> bool:
        """Deletes an empty bucket; False when it has objects."""
        if next(self._plain(bucket, ""), None) or next(self._odd(bucket), None):
            return False
        shutil.rmtree(self.root / bucket)
        shutil.rmtree(self._hidden / "odd" / bucket, ignore_errors=True)
        return True

    def find(self, bucket: str, key: str) -> Found | None:
        """The object, or None."""
        for file in self._places(bucket, key):
            try:
                stat = file.stat()
            except OSError:
                continue
            if os.path.isfile(file):
                return self._found(key, file, stat)
        return None

    def draft(self) -> Draft:
        """A new private file to write to."""
        file = self._hidden / "drafts" / str(next(self._serial))
        return Draft(file, file.open("wb"), hashlib.md5(usedforsecurity=False))

    def publish(self, bucket: str, key: str, draft: Draft, **facts: object) -> Found:
        """Makes a draft the object `key`, replacing what was there. `facts`: etag, type, metadata where known."""
        draft.stream.flush()
        stat = os.fstat(draft.stream.fileno())
        facts = {"key": key, "etag": f'"{draft.digest.hexdigest()}"'} | facts
        self._remember(draft.file, json.dumps(facts | {"mtime": stat.st_mtime_ns, "size": stat.st_size}), stat)
        draft.stream.close()
        plain, odd = self._plain_place(bucket, key), self._odd_place(bucket, key)
        if plain is not None:
            try:
                plain.parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft.file, plain)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                plain = None
            else:
                odd.unlink(missing_ok=True)
        if plain is None:
            odd.parent.mkdir(exist_ok=True)
            os.replace(draft.file, odd)
        found = self.find(bucket, key)
        assert found is not None, (bucket, key)
        return found

    def delete(self, bucket: str, key: str) -> bool:
        """Deletes an object; False when there was none."""
        found = self.find(bucket, key)
        if found is None:
            return False
        found.file.unlink()
        top = self.root / bucket
        for parent in found.file.parents:
            if top not in parent.parents:
                break
            try:
                parent.rmdir()
            except OSError:
                break
        return True

    def keys(self, bucket: str, prefix: str, delimiter: str) -> Iterator[tuple[str, Found | None]]:
        """(key, object) and (common prefix, None) of a listing, in the order of their UTF-8 bytes."""
        rows: dict[str, Found | None] = {}
        shallow = delimiter == "/"
        for key, file in itertools.chain(self._plain(bucket, prefix, shallow=shallow), self._odd(bucket)):
            if not key.startswith(prefix):
                continue
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            if end >= 0:
                rows[key[: end + len(delimiter)]] = None
            else:
                try:
                    rows[key] = self._found(key, file, file.stat())
                except FileNotFoundError:
                    continue
        yield from sorted(rows.items(), key=lambda row: row[0].encode())

    def _places(self, bucket: str, key: str) -> Iterator[Path]:
        plain = self._plain_place(bucket, key)
        if plain is not None:
            yield plain
        yield self._odd_place(bucket, key)

    def _plain_place(self, bucket: str, key: str) -> Path | None:
        parts = key.split("/")
        if any(p in ("", ".", "..") or "\0" in p or len(p.encode()) > NAME_BYTES_MAX for p in parts):
            return None
        return self.root.joinpath(bucket, *parts)

    def _odd_place(self, bucket: str, key: str) -> Path:
        name = quote(key, safe="")
        if len(name) > NAME_BYTES_MAX - 1:
            name = name[:150] + hashlib.sha256(key.encode()).hexdigest()
        return self._hidden / "odd" / bucket / ("_" + name)

    def _plain(self, bucket: str, prefix: str, *, shallow: bool = False) -> Iterator[tuple[str, Path]]:
        """Files whose keys may start with `prefix`; a shallow walk gives one file of each directory."""
        top = self.root / bucket
        folder = prefix.rpartition("/")[0]
        start = self._plain_place(bucket, folder) if folder else top
        if start is None or not start.is_dir():
            return
        pending = [start]
        while pending:
            place = pending.pop()
            try:
                entries = list(os.scandir(place))
            except OSError:
                continue
            for entry in entries:
                if entry.is_file():
                    yield os.path.relpath(entry.path, top), Path(entry.path)
                elif entry.is_dir() and shallow:
                    yield from itertools.islice(self._plain(bucket, os.path.relpath(entry.path, top) + "/"), 1)
                elif entry.is_dir():
                    pending.append(Path(entry.path))

    def _odd(self, bucket: str) -> Iterator[tuple[str, Path]]:
        try:
            entries = list(os.scandir(self._hidden / "odd" / bucket))
        except OSError:
            return
        for entry in entries:
            key = self._load(Path(entry.path), entry.stat()).get("key")
            yield (str(key) if key else unquote(entry.name[1:])), Path(entry.path)

    def _found(self, key: str, file: Path, stat: os.stat_result) -> Found:
        facts = self._load(file, stat)
        etag = facts.get("etag")
        if not etag:
            # A file put here by hand: strong all the same, because a change of content changes inode, time or size.
            text = f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"
            etag = f'"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}"'
        metadata = facts.get("metadata")
        return Found(
            key,
            file,
            stat.st_size,
            stat.st_mtime,
            str(etag),
            str(facts.get("type") or "binary/octet-stream"),
            metadata if isinstance(metadata, dict) else {},
        )

    def _remember(self, file: Path, text: str, stat: os.stat_result) -> None:
        try:
            os.setxattr(file, ATTRIBUTE, text.encode())
        except OSError:
            # No such attributes on this filesystem: known until the server ends.
            self._facts[(stat.st_ino, stat.st_mtime_ns, stat.st_size)] = text

    def _load(self, file: Path, stat: os.stat_result) -> dict[str, object]:
        try:
            text = os.getxattr(file, ATTRIBUTE).decode()
        except OSError:
            text = self._facts.get((stat.st_ino, stat.st_mtime_ns, stat.st_size), "")
        if not text:
            return {}
        facts: dict[str, object] = json.loads(text)
        if facts.get("mtime") != stat.st_mtime_ns or facts.get("size") != stat.st_size:
            return {}
        return facts
