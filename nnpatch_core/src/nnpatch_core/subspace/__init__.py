"""Subspaces of activations: learn one, patch it, steer with it."""

from nnpatch_core.spaces import Features, SiteRecord, Subspace

__all__ = ["Features", "SiteRecord", "Subspace"]
