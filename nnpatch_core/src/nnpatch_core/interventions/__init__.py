"""Where values come from."""

__all__ = []
