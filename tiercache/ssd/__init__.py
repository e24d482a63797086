"""TODO(docstring by the owner of this package)."""
