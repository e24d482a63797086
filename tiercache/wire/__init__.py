"""Wire: how processes and machines reach a cache that lives elsewhere."""
