"""Workers must not differ, or their numbers do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from nnpatch_core.errors import WorkerError
from nnpatch_core.scale.worker import Room, releases


def check_workers(workers: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The words that workers have in common, on all that decides on numbers.

    Args:
        workers: what each has, by names that people know.

    Raises:
        WorkerError: they differ, or have other releases than this process.
    """
    first, here = workers[0], releases()
    check_alike(here, {name: first.get(name, "none") for name in here}, "here")
    for each in workers[1:]:
        check_alike(first, each)
    return first


def check_alike(
    like: Mapping[str, str], parts: Mapping[str, str], where: str = "in another worker"
) -> None:
    """Raise `WorkerError` where one worker has something else than another.

    Args:
        like: what it must have.
        parts: what it has.
        where: who else has it.
    """
    told = "; ".join(
        f"{name}: {parts.get(name)} in a worker, {like.get(name)} {where}"
        for name in {**like, **parts}
        if like.get(name) != parts.get(name)
    )
    if told:
        raise WorkerError(f"workers must not differ, or their numbers do ({told})")


def budget_of_each(rooms: Sequence[Room]) -> int:
    """Bytes for each worker, if those of one memory share what is free there."""
    sharing = Counter(each.where for each in rooms)
    return max(1, min(each.budget // sharing[each.where] for each in rooms))
