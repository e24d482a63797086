"""Mooncake's own tests of its store's Python API, run against ours; see __main__.py."""
