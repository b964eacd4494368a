"""Parts of activations: subspaces, and features of autoencoders."""

from nnpatch_core.spaces.features import Features
from nnpatch_core.spaces.space import Limit, Space, check_width, encoded, interchanged
from nnpatch_core.spaces.spelling import as_space, by_layer
from nnpatch_core.spaces.subspace import (
    SiteRecord,
    Subspace,
    check_rank,
    interchange_by,
    site_record,
)

__all__ = [
    "Features",
    "Limit",
    "SiteRecord",
    "Space",
    "Subspace",
    "as_space",
    "by_layer",
    "check_rank",
    "check_width",
    "encoded",
    "interchange_by",
    "interchanged",
    "site_record",
]
