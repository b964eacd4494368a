"""Adapters for models that no plugin knows, read off the model."""

from nnpatch_core.infer.adapter import (
    Inference,
    infer_adapter,
    infer_model_api,
    put_to_test,
    read_model,
)

__all__ = ["Inference", "infer_adapter", "infer_model_api", "put_to_test", "read_model"]
