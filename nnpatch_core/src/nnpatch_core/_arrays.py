"""Types of numpy arrays."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
