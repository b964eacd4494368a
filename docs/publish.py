"""Puts built pages into a site that has a folder for each version.

`python docs/publish.py BUILT SITE VERSION`: `dev` is the main branch, `0.1.0` or `v0.1.0` a
release. The newest release is there as `stable` as well, and is what the site opens with.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from packaging.version import InvalidVersion, Version

DEV, STABLE = "dev", "stable"
#: Opens another page of the site, also for those who let pages run no scripts.
OPEN = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>nnpatch</title>
<meta http-equiv="refresh" content="0; url={folder}/">
<a href="{folder}/">nnpatch</a>
"""


def folder_of(version: str) -> str:
    """The folder of a version: `dev`, or the release without its `v`.

    Raises:
        ValueError: it is neither.
    """
    if version == DEV:
        return DEV
    try:
        return str(Version(version))
    except InvalidVersion as error:
        raise ValueError(f"{version!r} is neither {DEV!r} nor a release") from error


def releases(site: Path) -> list[Version]:
    """The releases that a site has, the newest first."""
    found = []
    for path in site.iterdir():
        if path.is_dir() and path.name not in (DEV, STABLE) and path.name[0].isdigit():
            found.append(Version(path.name))
    return sorted(found, reverse=True)


def publish(built: Path, site: Path, version: str) -> None:
    """Put the pages of a version in the place of what the site had of it.

    Args:
        built: the pages.
        site: the site; it is made where it is missing.
        version: `dev` or a release.

    Raises:
        ValueError: the version is neither, or nothing was built.
    """
    folder = folder_of(version)
    if not (built / "index.html").exists():
        raise ValueError(f"{built} has no pages")
    site.mkdir(parents=True, exist_ok=True)
    _replace(built, site / folder)
    there = releases(site)
    # A release candidate is for those who look for it.
    stable = next((each for each in there if not each.is_prerelease), None)
    if stable is not None and str(stable) == folder:
        _replace(built, site / STABLE)
    versions = [{"folder": str(each), "name": str(each)} for each in there]
    if (site / DEV).exists():
        versions.insert(0, {"folder": DEV, "name": "not released"})
    listed = {"stable": str(stable) if stable is not None else None, "versions": versions}
    (site / "versions.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    opened = OPEN.format(folder=DEV if stable is None else STABLE)
    (site / "index.html").write_text(opened, encoding="utf-8")
    # Else folders that begin with _ are left out.
    (site / ".nojekyll").touch()


def _replace(built: Path, there: Path) -> None:
    if there.exists():
        shutil.rmtree(there)
    shutil.copytree(built, there, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo*"))


def main() -> None:
    """Publish what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("built", type=Path)
    parser.add_argument("site", type=Path)
    parser.add_argument("version")
    arguments = parser.parse_args()
    publish(arguments.built, arguments.site, arguments.version)


if __name__ == "__main__":
    main()
