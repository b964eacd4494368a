"""The version of the four distributions, which their builds read from this file."""

__version__ = "0.1.0"
