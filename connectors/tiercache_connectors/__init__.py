"""Connectors: each translates one host's interface to calls of tiercache, and holds no cache state of its own."""
