"""The memory tier: segments of shareable memory, their extent tables, and the tier over them."""
