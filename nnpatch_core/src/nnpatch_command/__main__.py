"""`python -m nnpatch_command` is `nnpatch`."""

from nnpatch_command.start import main

if __name__ == "__main__":
    raise SystemExit(main())
