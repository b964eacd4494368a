"""Versions of the site stand beside each other, and the newest release is the stable one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import publish
import pytest


def built(folder: Path, words: str) -> Path:
    """Pages that say some words."""
    folder.mkdir(exist_ok=True)
    (folder / "index.html").write_text(words, encoding="utf-8")
    (folder / ".doctrees").mkdir(exist_ok=True)
    return folder


def listed(site: Path) -> dict[str, Any]:
    return dict(json.loads((site / "versions.json").read_text(encoding="utf-8")))


def opened(site: Path) -> str:
    [folder] = re.findall(r"url=([\w.]+)/", (site / "index.html").read_text(encoding="utf-8"))
    return str(folder)


def test_main_alone(tmp_path: Path) -> None:
    publish.publish(built(tmp_path / "built", "new"), tmp_path / "site", "dev")
    site = tmp_path / "site"
    assert listed(site) == {
        "stable": None,
        "versions": [{"folder": "dev", "name": "not released"}],
    }
    assert opened(site) == "dev"
    assert (site / ".nojekyll").exists()
    assert not (site / "dev" / ".doctrees").exists()


def test_the_newest_release_is_stable(tmp_path: Path) -> None:
    site = tmp_path / "site"
    for version in ("v0.9.0", "v0.10.0", "dev", "v0.2.0", "v0.11.0rc1"):
        publish.publish(built(tmp_path / "built", version), site, version)
    assert listed(site)["stable"] == "0.10.0"
    folders = [each["folder"] for each in listed(site)["versions"]]
    assert folders == ["dev", "0.11.0rc1", "0.10.0", "0.9.0", "0.2.0"]
    assert (site / "stable" / "index.html").read_text(encoding="utf-8") == "v0.10.0"
    assert opened(site) == "stable"


def test_a_version_is_replaced_whole(tmp_path: Path) -> None:
    site = tmp_path / "site"
    first = built(tmp_path / "first", "first")
    (first / "gone.html").touch()
    publish.publish(first, site, "dev")
    publish.publish(built(tmp_path / "second", "second"), site, "dev")
    assert (site / "dev" / "index.html").read_text(encoding="utf-8") == "second"
    assert not (site / "dev" / "gone.html").exists()


@pytest.mark.parametrize("version", ["main", "stable", "../else", "v1.x"])
def test_other_names_are_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        publish.publish(built(tmp_path / "built", ""), tmp_path / "site", version)


def test_nothing_is_published_where_nothing_was_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pages"):
        publish.publish(tmp_path, tmp_path / "site", "dev")
    assert not (tmp_path / "site").exists()
