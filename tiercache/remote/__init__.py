"""Origins: object stores over obstore, any fsspec filesystem, and the patience that wraps both. See `opening`."""
