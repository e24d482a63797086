"""The demo: TPC-H (or a user's own Parquet) through the filesystem, direct, cold and warm, every result compared."""
