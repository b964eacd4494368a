"""Facts that break the rules of advice, and such as nearly do."""

from __future__ import annotations

from typing import Any

from nnpatch_core.report import Race, Width

#: For each rule facts that break it, and such as nearly do.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "not-confident": ({"unsure": (0, 2), "prompts": 9}, {"unsure": ()}),
    "small-denominator": ({"denominator": "They may not differ"}, {"weak": ()}),
    "one-prompt": ({"prompts": 1}, {"prompts": 2}),
    "few-prompts": (
        {"width": Width("mlp L1", 0.2, 21.0, 20), "prompts": 20},
        {"width": Width("mlp L1", 0.2, 20.0, 20), "prompts": 20},
    ),
    "overlap": ({"race": Race("a 0.1 to 0.3", "b 0.2 to 0.4")}, {"race": None}),
    "estimates-alone": ({"estimates": 12}, {"estimates": 0}),
    "mixed-positions": ({"mixed": "Prompts have 5 to 7 tokens"}, {"mixed": ""}),
    "probability-alone": (
        {"metrics": ("answer_probability",)},
        {"metrics": ("answer_probability", "logit_difference")},
    ),
    "noise": ({"noise": True}, {"noise": False}),
    "zero-ablation": ({"ablation": "zero"}, {"ablation": "mean"}),
    "one-answer": ({"one_answer": " are"}, {"one_answer": ""}),
    "several-sites": ({"together": "3 of 9 cells patch several sites"}, {"together": ""}),
    "one-direction": ({"one_way": True}, {"one_way": False}),
    "one-ablation": ({"circuit": True, "controls": ("random",)}, {"circuit": False}),
    "chosen-here": ({"chosen_here": True}, {"chosen_here": False}),
    "no-controls": ({"circuit": True}, {"circuit": True, "controls": ("complement",)}),
    "more-than-whole": ({"more_than_whole": True}, {"more_than_whole": False}),
    "control-as-good": ({"rivals": ("random labels",)}, {"rivals": ()}),
}
