"""The errors that nnpatch raises: one class per kind of mistake, each also a `ValueError`."""

from typing import Any

from nnpatch_core._printable import printable


class PatchingError(ValueError):
    """The root of every error that nnpatch raises on bad input."""

    def __init__(self, *args: Any) -> None:
        # Messages name what others have written, such as the names of plugins.
        shown = (printable(arg, "\n\t") if isinstance(arg, str) else arg for arg in args)
        super().__init__(*shown)


class UnknownNameError(PatchingError):
    """A component, strategy, metric, engine, method or adapter name that nobody has registered."""


class LayerError(PatchingError):
    """A layer that is not an integer, or that the model does not have."""


class HeadError(PatchingError):
    """A head that does not exist, or a head on a component without heads."""


class PositionError(PatchingError):
    """Token positions that are malformed, duplicated or outside the prompt."""


class TokensError(PatchingError):
    """Tokens of a wrong type, shape, length or vocabulary, or prompts that do not pair up."""


class MaskError(PatchingError):
    """An attention mask of a wrong shape or content."""


class AnswerError(PatchingError):
    """Answers that are not one token, not in the vocabulary, or of a wrong shape."""


class AdapterError(PatchingError):
    """No adapter for a model, several, or one that does not fit it."""


class MetricError(PatchingError):
    """A metric that cannot be computed, does not keep what it declares, or divides by 0."""


class ConfidenceError(PatchingError):
    """A model that does not prefer the expected answer, where this was asked for."""


class OutcomeError(PatchingError):
    """An outcome asked for something it does not hold, or a file that is none or damaged."""


class NotSweptError(OutcomeError, KeyError):
    """A site name that an outcome does not have: a `KeyError` too, as in any mapping."""

    # A KeyError shows its message in quotes.
    __str__ = ValueError.__str__


class GradientError(PatchingError):
    """A model through which no gradient flows, so that nothing can be attributed."""


class SubspaceError(PatchingError):
    """A subspace that is none, does not fit its site, or cannot be learned, read or written."""


class SteeringError(PatchingError):
    """A value to steer with that does not fit its site, or a run that cannot be steered rightly."""


class EdgeError(PatchingError):
    """A node, an edge or a circuit that a model does not have, or a file that holds none."""


class EngineError(PatchingError):
    """An engine that cannot run this sweep: its message says why."""


class MemoryBudgetError(PatchingError):
    """A sweep that does not fit in the memory that it may use."""


class CheckpointError(PatchingError):
    """A checkpoint of another sweep, or a file that is none or damaged, or cannot be written."""


class ShardError(PatchingError):
    """A shard that there is not, shards that do not belong together, or one that is missing."""


class WorkerError(PatchingError):
    """Workers that cannot be started, differ from one another, or die again and again."""


class RemoteError(PatchingError):
    """A model that cannot run elsewhere, what cannot be sent there, or a server that fails."""


class SettingsError(PatchingError):
    """Settings of a run that there are not, or that do not go together; a folder it cannot use."""


class PluginWarning(UserWarning):
    """A plugin was left out: it did not import, or one of its hooks raised."""


class AdapterWarning(UserWarning):
    """An adapter was chosen for a model of a type that it does not claim."""


class PaddingWarning(UserWarning):
    """Tokens look padded, but no attention mask was given."""


class AnswerWarning(UserWarning):
    """Answers were not taken as they are: a space was put in, or a metric sees but a part."""


class PromptWarning(UserWarning):
    """Prompts are not what they seem: some were dropped, or what is compared does not line up."""


class EngineWarning(UserWarning):
    """A sweep runs in a dearer engine than was to be expected, or beside hooks that count."""


class EstimateWarning(UserWarning):
    """A repair of an estimate was asked for that changes nothing at the sites of the sweep."""


class ReleaseWarning(UserWarning):
    """A release of a library that nnpatch was not tested with, and that fails its self-check."""


class WorkerWarning(UserWarning):
    """A worker is lost, and others measure what it had."""


class CheckpointWarning(UserWarning):
    """A checkpoint cannot be written, or the sweep depends on what it cannot compare."""


class MemoryWarning(UserWarning):
    """A device ran out of memory, and less runs together; or how much is free is not known."""


class StatisticsWarning(UserWarning):
    """Prompts are too few, or too much like each other, to say how sure a value is."""


class PictureWarning(UserWarning):
    """A picture that a run leaves out, as it cannot be drawn."""
