"""Names of repositories on the hub of Hugging Face."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

_NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_LONGEST = 96


def is_repo_id(name: Any) -> TypeGuard[str]:
    """Whether this may be the name of a repository: `owner/name`, or a name alone.

    Examples:
        >>> is_repo_id("HuggingFaceTB/SmolLM2-135M"), is_repo_id("../models/mine")
        (True, False)
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST:
        return False
    return "--" not in name and ".." not in name and not name.endswith(("-", ".", ".git"))
