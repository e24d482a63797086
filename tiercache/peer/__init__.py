"""Peer: other machines' caches as the next place to look, and to spill to."""
