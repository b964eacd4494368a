"""The adapter keeps what every adapter must: the checks of nnpatch's conformance kit."""

from nnpatch_core.plugins import find_adapter
from nnpatch_core.testing import parametrize_with_checks, tiny_model
from nnpatch_gpt2 import GPT2


@parametrize_with_checks(GPT2)
def test_conformance(check):
    check()


def test_found_by_the_type_of_a_model():
    assert find_adapter(None, tiny_model("gpt2")) is GPT2
