"""Adapters for models that no plugin knows, read off the model."""

from nnpatch_core.infer.adapter import Inference, infer_adapter, put_to_test, read_model
from nnpatch_core.infer.hooks import infer_model_api

__all__ = ["Inference", "infer_adapter", "infer_model_api", "put_to_test", "read_model"]
