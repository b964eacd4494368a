"""A sweep as it runs."""

__all__ = []
