"""How good scores are at finding circuits: areas under faithfulness, and under the ROC curve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._printable import shown
from nnpatch_core.circuits.choosing import Floats
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.scored import check_scores
from nnpatch_core.errors import EdgeError

#: The sizes of MIB's circuits, as shares of all edges.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def areas(fractions: Any, faithfulness: Any) -> tuple[float, float]:
    """The areas CPR and CMD of MIB, by trapezoids over the fraction as it is.

    CPR is the area under the faithfulness f, the larger the better; CMD that between f and 1, the
    smaller the better: each trapezoid has `|1 - f|` of its ends, also where f crosses 1 between
    them.
    MIB divides neither by the range of the fractions: from 0.001 to 1 a circuit that is always
    faithful has a CPR of 0.999.

    Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (2025).

    Args:
        fractions: `[points]`, increasing: how many of the edges each circuit has, as shares.
        faithfulness: `[points]`: of each circuit.

    Returns:
        CPR and CMD; nan if a faithfulness is.

    Raises:
        EdgeError: fewer than two points, not as many of both, or fractions that do not increase.

    Examples:
        >>> cpr, cmd = areas([0.0, 0.5, 1.0], [0.0, 0.8, 1.0])
        >>> round(cpr, 3), round(cmd, 3)
        (0.65, 0.35)
        >>> round(areas(FRACTIONS, [1.0] * 10)[0], 3)
        0.999
    """
    across, values = as_numbers(fractions, "fractions"), as_numbers(faithfulness, "faithfulness")
    if len(across) < 2 or len(across) != len(values):
        raise EdgeError(
            "areas need at least two points, and a faithfulness for each fraction, got "
            f"{len(across)} fractions and {len(values)} of faithfulness"
        )
    steps = np.diff(across)
    if not (steps > 0).all() or not np.isfinite(across).all():
        raise EdgeError(f"fractions must increase, got {shown(across.tolist())}")
    cpr, cmd = _areas(steps, values)
    return float(cpr), float(cmd)


def areas_of_draws(fractions: Sequence[float]) -> Callable[[Floats], Floats]:
    """CPR and CMD, `[2, draws]`, of the faithfulness in each draw of prompts, `[points, draws]`."""
    steps = np.diff(np.array(fractions, dtype=np.float64))
    return lambda values: np.stack(_areas(steps, values))


def auroc(scores: Any, known: Circuit, *, absolute: bool = True) -> float:
    """How well scores tell the edges of a known circuit from all others.

    It is the probability that an edge of the circuit has a score of larger size than one outside; a
    tie counts half. (MIB draws the ROC curve through ten circuits that are chosen greedily; this is
    the whole one, of all edges by their scores alone.)

    Args:
        scores: `[senders, receivers]`, or something that has such a `matrix`, as the outcome of
            `edge_patching` does.
        known: the circuit.
        absolute: whether sizes count, so that edges against the answer come first as well; False
            goes by values.

    Returns:
        The area; nan if all edges are in the circuit, or none.

    Raises:
        EdgeError: no scores of these nodes, or an edge that has none.

    Examples:
        >>> import torch
        >>> from nnpatch_core.edges import Nodes
        >>> nodes = Nodes(query=(1,), key_value=(1,), parallel=(False,))
        >>> known = Circuit.of(nodes, ["input->m0", "m0->logits"])
        >>> scores = torch.full((3, 5), float("nan"))
        >>> scores[torch.from_numpy(nodes.mask)] = torch.tensor([1.0, 2, 3, 9, 0, 4, 5, 4])
        >>> auroc(scores, known)
        0.875
    """
    check_flags(absolute=absolute)
    if not isinstance(known, Circuit):
        raise EdgeError(f"known must be a Circuit, got {shown(known)}")
    matrix = scores
    if not isinstance(scores, Tensor | np.ndarray):
        if getattr(scores, "nodes", known.nodes) != known.nodes:
            raise EdgeError("the scores are of other nodes than the known circuit")
        matrix = getattr(scores, "matrix", scores)
    found = check_scores(known.nodes, matrix, "scores").numpy()[known.nodes.mask]
    without = int(np.isnan(found).sum())
    if without:
        raise EdgeError(f"{without} of the {len(found)} edges have no score")
    marks = known.kept.numpy()[known.nodes.mask]
    if absolute:
        found = np.abs(found)
    inside, outside = found[marks], np.sort(found[~marks])
    if not len(inside) or not len(outside):
        return float("nan")
    below = np.searchsorted(outside, inside, side="left")
    up_to = np.searchsorted(outside, inside, side="right")
    return float((below + up_to).sum() / (2 * len(inside) * len(outside)))


def as_numbers(given: Any, what: str) -> Floats:
    """`[points]`, float64.

    Raises:
        EdgeError: something else.
    """
    # A tensor that gives no numbers, such as one without data, raises errors of several kinds.
    with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
        numbers = given.detach().cpu().tolist() if isinstance(given, Tensor) else listed(given)
        if isinstance(numbers, list | tuple) and not isinstance(given, str | bytes):
            return np.array([float(each) for each in numbers], dtype=np.float64)
    raise EdgeError(f"{what} must be numbers, got {shown(given)}")


def _areas(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """CPR and CMD of `[points, ...]`."""
    return _trapezoids(steps, values), _trapezoids(steps, np.abs(1 - values))


def _trapezoids(steps: Floats, values: Floats) -> Floats:
    under: Floats = np.tensordot(steps, (values[1:] + values[:-1]) / 2, 1)
    return under
