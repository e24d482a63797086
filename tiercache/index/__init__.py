"""The one index of all local tiers: runs of slots, payload rows behind them, pins, states and their transitions.

Shape (measured in bench/memory.py). Facts of one cached object live in a *slot*, a row of packed NumPy columns; bytes
belong to a *payload row* that the slot points to, with a reference count, so that equal payloads can share one.
A *run* lists slots in order; runs are rows too, found by key through a packed hash table, never Python objects.
One lock guards everything here and is held for microseconds: never across I/O, a copy or an await.
"""
