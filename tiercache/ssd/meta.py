"""Rows: the small ordered store of facts beside the segments, and RocksDB (through rocksdict) as its real form.

rocksdict holds the GIL on single writes and, with `sync`, through the fsync; so batches are written unsynced, which
takes microseconds, and made durable by `flush_wal` in a thread, which lets go of the GIL. Whoever syncs once commits
all that was written before: group commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class RowsError(UnavailableError):
    """The store of rows is damaged or refuses to work; rows are hints, so whoever gets this goes on without them."""


class Rows(Protocol):
    """An ordered map of bytes to bytes with atomic batches that become durable, in order, at `sync`.

    Every method blocks and raises RowsError. Damage is found out at `scan` and `get` at the latest.
    """

    def write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Applies deletes, then puts, all or nothing, also over a crash; visible at once, durable at `sync`."""
        ...

    def sync(self) -> None:
        """Returns when every batch written before the call is durable."""
        ...

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        ...

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Pairs whose key starts with `prefix`, in the order of keys."""
        ...

    def position(self) -> int:
        """A number that grows with every batch, over all lives of the store: if it is smaller, batches are lost."""
        ...

    def close(self) -> None:
        """Gives the store back; what was written and not synced may be kept or lost."""
        ...


class RocksRows:
    """Rows in a RocksDB directory."""

    def __init__(self, db: Any, batch: Any) -> None:  # rocksdict is loaded late and has no types we could name here
        self._db = db
        self._batch = batch

    def write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        batch = self._batch(raw_mode=True)
        for key in deletes:
            batch.delete(key)
        for key, value in puts:
            batch.put(key, value)
        try:
            self._db.write(batch)
        except Exception as fault:  # rocksdict raises bare Exception for every status of RocksDB
            raise RowsError(f"rows cannot be written: {fault}") from fault

    def sync(self) -> None:
        try:
            self._db.flush_wal(True)
        except Exception as fault:
            raise RowsError(f"rows cannot be made durable: {fault}") from fault

    def get(self, key: bytes) -> bytes | None:
        try:
            value = self._db.get([key])[0]
        except Exception as fault:
            raise RowsError(f"rows cannot be read: {fault}") from fault
        return None if value is None else bytes(value)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        try:
            cursor = self._db.iter()
            cursor.seek(prefix)
            while cursor.valid():
                key = cursor.key()
                if not key.startswith(prefix):
                    return
                yield key, cursor.value()
                cursor.next()
            cursor.status()
        except Exception as fault:
            raise RowsError(f"rows cannot be read: {fault}") from fault

    def position(self) -> int:
        return int(self._db.latest_sequence_number())

    def close(self) -> None:
        try:
            self._db.close()
        except Exception as fault:
            raise RowsError(f"rows cannot be closed: {fault}") from fault


def open_rocks(directory: str, budget_bytes: int) -> RocksRows:
    """Opens or makes the RocksDB of a tier, sized so that its files stay within `budget_bytes`."""
    import rocksdict

    try:
        return RocksRows(rocksdict.Rdict(directory, _options(budget_bytes)), rocksdict.WriteBatch)
    except Exception as fault:
        raise RowsError(f"rows in {directory} cannot be opened: {fault}") from fault


def repair_rocks(directory: str, budget_bytes: int) -> None:
    """Has RocksDB save what it can from a damaged directory; deleted rows may come back, which is harmless: each names
    the life of its segment, and the records decide."""
    import rocksdict

    try:
        rocksdict.Rdict.repair(directory, _options(budget_bytes))
    except Exception as fault:
        raise RowsError(f"rows in {directory} cannot be repaired: {fault}") from fault


def _options(budget_bytes: int) -> Any:
    import rocksdict

    write_buffer = max(256 << 10, min(16 << 20, budget_bytes // 8))
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(write_buffer)
    options.set_max_write_buffer_number(2)
    options.set_max_total_wal_size(2 * write_buffer)
    options.set_max_background_jobs(2)
    options.set_max_open_files(64)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(64 << 10)
    options.set_max_manifest_file_size(64 << 10)
    options.set_level_zero_file_num_compaction_trigger(4)
    options.set_target_file_size_base(max(1 << 20, budget_bytes // 16))
    options.set_max_bytes_for_level_base(max(2 << 20, budget_bytes // 4))
    options.set_compression_type(rocksdict.DBCompressionType.lz4())
    options.set_wal_recovery_mode(rocksdict.DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_skip_stats_update_on_db_open(True)
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(rocksdict.Cache(1 << 20))
    options.set_block_based_table_factory(table)
    return options
