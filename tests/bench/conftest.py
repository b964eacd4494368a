"""Nothing here is a test: pytest, which looks for doctests everywhere, must not import it."""

collect_ignore_glob = ["*.py"]
