"""What tests and examples need: tiny random models, their adapter and a tokenizer, offline."""

from nnpatch_core.testing.models import tiny_api, tiny_model, tiny_tokenizer

__all__ = ["tiny_api", "tiny_model", "tiny_tokenizer"]
