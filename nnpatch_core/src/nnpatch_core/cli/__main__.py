"""`python -m nnpatch_core.cli` is `nnpatch`."""

from nnpatch_core.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
