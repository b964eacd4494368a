"""Circuits in the files of EAP-IG and of MIB, which have keys and values for each query head."""

from nnpatch_core.circuits.files.content import Content
from nnpatch_core.circuits.files.json_file import read_json, write_json
from nnpatch_core.circuits.files.pt_file import read_pt

__all__ = ["Content", "read_json", "read_pt", "write_json"]
