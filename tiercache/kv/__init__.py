"""KV caches of language models: what a stored block is, who holds which part of it, and how it is moved.

layout (what is stored), shard (who holds what), chain (keys), planes (where elements lie in an engine's memory), moving
(copies between the two), proof (that planes tell the truth).

store (the KV cache of one rank) with saving, loading, reading, sequence (saves what is new) and groups (hybrid models);
comparing and variants (ranks that should hold the same, and do not), workers (the threads that copy).

recompute (how much of a prefix is worth loading) and rates (how fast tiers are); tensors (encoder outputs), represent
and float8 (other representations under keys of their own).
"""
