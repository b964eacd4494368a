"""The built-in names as types, by which an editor completes them.

Where names can be added, by an adapter or a plugin, an argument takes its names *or* any text, as
`ComponentName | str`. For a type checker that is `str`; editors by Pyright still offer the names.
Where they cannot, a checker also finds a misspelled one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

#: Components and their synonyms, in execution order; an adapter may have others.
ComponentName: TypeAlias = Literal[
    "resid_pre",
    "q",
    "k",
    "v",
    "o",
    "z",
    "attn",
    "attn_out",
    "mlp",
    "mlp_out",
    "resid",
    "resid_post",
]
#: Position strategies; plugins may add others.
SeqPosName: TypeAlias = Literal[
    "all", "custom", "custom_constant", "each", "last", "lastk", "spans"
]
#: Metrics; plugins may add others.
MetricName: TypeAlias = Literal[
    "answer_log_probability",
    "answer_probability",
    "answer_set_difference",
    "kl_divergence",
    "logit_difference",
    "loss",
    "sequence_log_probability",
    "sequence_log_probability_difference",
]
#: Engines, for `engine=`.
EngineName: TypeAlias = Literal["auto", "cone", "full"]
#: Estimates that choose cells, for `screen=`.
ScreenName: TypeAlias = Literal["attribution", "atp*"]
#: Methods of ablation, for `method=`.
AblationName: TypeAlias = Literal["zero", "mean", "resample"]
#: Those that can be estimated, for `ablation=`.
EstimatedAblationName: TypeAlias = Literal["zero", "mean"]
#: Methods of edge patching, for `method=`.
EdgeMethodName: TypeAlias = Literal[
    "exact", "eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"
]
