"""The cone engine against whole forwards and plain hooks, and with faults planted in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core import (
    DecoderAPI,
    MultiSite,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    decoder_components,
    reads_tokens,
)
from nnpatch_core.batch import pack_left
from nnpatch_core.engine import (
    Recorded,
    cone,
    edits,
    head,
    limits_of,
    memory,
    open_cone,
    open_full,
    prefix,
    record,
    rows,
    target,
    trace,
)
from nnpatch_core.errors import EngineError, MemoryBudgetError, MetricError, PositionError
from nnpatch_core.testing import tiny_model
from nnpatch_gemma import Gemma, Gemma2, Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral

from .oracle import COMPONENTS, Oracle, Place, Prompt, lay_out, random_prompts
from .test_families import FAMILIES, model_of
