"""Refuses, on import, the releases of nnsight and transformers that nnpatch does not support.

Both change between releases what nnpatch builds on. Without this a user would learn of it by an
error deep inside one of them, or not at all. The ranges are those of the distribution's metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

_DISTRIBUTION = "nnpatch-core"
_CHECKED = ("nnsight", "transformers")
#: The newest releases that the tests have passed on, as `constraints.txt` has them.
TESTED = {"nnsight": "0.8.1", "torch": "2.13.0", "transformers": "5.24.0"}


def _required() -> Iterator[Requirement]:
    """Read the distribution's requirements on the checked libraries."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:  # vendored, or a source tree that nobody installed
        return
    for requirement in map(Requirement, lines):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name in _CHECKED and applies:
            yield requirement


def _installed(name: str) -> Version | None:
    """The version that is installed, `None` where nothing tells it."""
    try:
        return Version(metadata.version(name))
    # The last two: a metadata folder without its file, as a broken uninstall leaves it.
    except (metadata.PackageNotFoundError, InvalidVersion, TypeError, KeyError):
        return None


def untested() -> dict[str, str]:
    """The libraries that are installed in a newer release than the tests know, and which."""
    installed = {name: _installed(name) for name in TESTED}
    # A build's own mark, such as +cpu, makes no release newer.
    public = {name: Version(version.public) for name, version in installed.items() if version}
    return {
        name: str(version) for name, version in public.items() if version > Version(TESTED[name])
    }


def _bounds(requirement: Requirement) -> str:
    """The range, its lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def _check(requirements: Iterable[Requirement]) -> None:
    """Raise `ImportError` if a library is installed in a version outside its range."""
    outside, mended = [], []
    for requirement in requirements:
        version = _installed(requirement.name)
        # Whoever installed a pre-release wants it: it counts by its place in the order.
        if version and not requirement.specifier.contains(version, prereleases=True):
            bounds = _bounds(requirement)
            outside.append(f"{requirement.name} {bounds}, but {version} is installed")
            mended.append(f'"{requirement.name}{bounds}"')
    if outside:
        raise ImportError(
            f"{_DISTRIBUTION} needs {' and '.join(outside)}; mend it with: "
            f"pip install {' '.join(mended)}"
        )


_check(_required())
