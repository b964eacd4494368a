"""Where advice comes from: papers, each with where it can be read."""

from __future__ import annotations

import attrs


@attrs.frozen
class Source:
    """A paper.

    Args:
        authors: their names.
        year: of the version that is cited.
        title: of the paper.
        link: where it can be read.

    Examples:
        >>> str(PRACTICES)
        'Zhang and Nanda (2023), Towards Best Practices of Activation Patching in Language Models'
    """

    authors: str
    year: int
    title: str
    link: str

    def __str__(self) -> str:
        return f"{self.authors} ({self.year}), {self.title}"


def _arxiv(authors: str, year: int, title: str, number: str) -> Source:
    return Source(authors, year, title, f"https://arxiv.org/abs/{number}")


PRACTICES = _arxiv(
    "Zhang and Nanda",
    2023,
    "Towards Best Practices of Activation Patching in Language Models",
    "2309.16042",
)
INTERPRETING = _arxiv(
    "Heimersheim and Nanda", 2024, "How to use and interpret activation patching", "2404.15255"
)
ATP_STAR = _arxiv(
    "Kramár, Lieberum, Shah and Nanda",
    2024,
    "AtP*: An efficient and scalable method for localizing LLM behaviour to components",
    "2403.00745",
)
BY_POSITION = _arxiv(
    "Haklay, Orgad, Bau, Mueller and Belinkov",
    2025,
    "Position-aware Automatic Circuit Discovery",
    "2502.04577",
)
RATIOS = _arxiv(
    "Franz", 2007, "Ratios: A short guide to confidence limits and proper use", "0710.2024"
)
OVERLAP = Source(
    "Schenker and Gentleman",
    2001,
    "On Judging the Significance of Differences by Examining the Overlap Between Confidence "
    "Intervals",
    "https://doi.org/10.1198/000313001317097960",
)
NOT_ROBUST = _arxiv(
    "Miller, Chughtai and Saunders",
    2024,
    "Transformer Circuit Faithfulness Metrics are not Robust",
    "2407.08734",
)
MIB = _arxiv("Mueller et al.", 2025, "MIB: A Mechanistic Interpretability Benchmark", "2504.13151")
IN_THE_WILD = _arxiv(
    "Wang, Variengien, Conmy, Shlegeris and Steinhardt",
    2022,
    "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
    "2211.00593",
)
ILLUSION = _arxiv(
    "Makelov, Lange and Nanda",
    2023,
    "Is This the Subspace You Are Looking for? An Interpretability Illusion for Subspace "
    "Activation Patching",
    "2311.17030",
)
CONTROL_TASKS = _arxiv(
    "Hewitt and Liang", 2019, "Designing and Interpreting Probes with Control Tasks", "1909.03368"
)
ERROR_BARS = _arxiv(
    "Miller",
    2024,
    "Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations",
    "2411.00640",
)
