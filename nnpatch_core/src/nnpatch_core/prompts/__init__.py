"""From prompts in text, chats or tables to everything that `activation_patching` takes."""

from nnpatch_core.prompts.keywords import AblationArguments, PatchingArguments
from nnpatch_core.prompts.pairs import PromptPairs
from nnpatch_core.prompts.references import read_prompts
from nnpatch_core.prompts.rows import COLUMNS, TextPair
from nnpatch_core.prompts.subsets import grouped

__all__ = [
    "COLUMNS",
    "AblationArguments",
    "PatchingArguments",
    "PromptPairs",
    "TextPair",
    "grouped",
    "read_prompts",
]
