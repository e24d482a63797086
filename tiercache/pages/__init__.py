"""Pages of files: which version is read, which parts are missing, and the fewest requests that bring them."""
