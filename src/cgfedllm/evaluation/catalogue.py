"""The benchmarks that can be run: where their questions lie and how scores are summed up.

What is asked, and how, is lm-eval's: its stock task definitions are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cgfedllm.data.names import did_you_mean
from cgfedllm.errors import ConfigError

Average = Literal["questions", "subjects"]
"""Over what a mean is taken: every question counts alike, or every subject does."""


@dataclass(frozen=True)
class Measure:
    """One way to judge an answer, by lm-eval's names for it.

    Parameters
    ----------
    metric, filter : str
        Keys of lm-eval's results.
    """

    metric: str
    filter: str = "none"


@dataclass(frozen=True)
class Group:
    """One line of a summary.

    Parameters
    ----------
    name : str
        As the benchmark's authors call it.
    subjects : tuple of str or str or None
        Members by name, or a tag of lm-eval's; None is all members of the other groups.
    average : str
        Over what the mean is taken.
    measure : str
        A key of the benchmark's `measures`.
    """

    name: str
    subjects: tuple[str, ...] | str | None
    average: Average
    measure: str = "accuracy"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of lm-eval's.

    Parameters
    ----------
    name, title : str
        What it is called on the command line, and in tables.
    data : str
        Data set on the Hugging Face hub; also its folder in a local copy.
    split : str
        The split whose questions are asked.
    folder, prefix : str
        Where lm-eval keeps the tasks, and what their names begin with.
    groups : tuple of Group
        The summary, in the order it is printed.
    chance : float
        Share of right answers somebody gets who guesses.
    in_words : bool
        Whether answers are written out, rather than chosen from options.
    measures : mapping
        Ways to judge an answer; the first is the one subjects are listed with.
    """

    name: str
    title: str
    data: str
    split: str
    folder: str
    prefix: str
    groups: tuple[Group, ...]
    chance: float
    in_words: bool = False
    measures: Mapping[str, Measure] = field(default_factory=lambda: {"accuracy": Measure("acc")})

    @property
    def main_measure(self) -> str:
        """The one subjects are listed with."""
        return next(iter(self.measures))


# Categories and the hard subset as in C-Eval's repository (subject_mapping.json) and paper
# (Huang et al., arXiv 2305.08322, section 2.4); lm-eval does not group its C-Eval tasks.
_CEVAL_STEM = (
    "computer_network", "operating_system", "computer_architecture", "college_programming",
    "college_physics", "college_chemistry", "advanced_mathematics", "probability_and_statistics",
    "discrete_mathematics", "electrical_engineer", "metrology_engineer", "high_school_mathematics",
    "high_school_physics", "high_school_chemistry", "high_school_biology",
    "middle_school_mathematics", "middle_school_biology", "middle_school_physics",
    "middle_school_chemistry", "veterinary_medicine",
)  # fmt: skip
_CEVAL_SOCIAL_SCIENCE = (
    "college_economics", "business_administration", "marxism", "mao_zedong_thought",
    "education_science", "teacher_qualification", "high_school_politics", "high_school_geography",
    "middle_school_politics", "middle_school_geography",
)  # fmt: skip
_CEVAL_HUMANITIES = (
    "modern_chinese_history", "ideological_and_moral_cultivation", "logic", "law",
    "chinese_language_and_literature", "art_studies", "professional_tour_guide",
    "legal_professional", "high_school_chinese", "high_school_history", "middle_school_history",
)  # fmt: skip
_CEVAL_OTHER = (
    "civil_servant", "sports_science", "plant_protection", "basic_medicine", "clinical_medicine",
    "urban_and_rural_planner", "accountant", "fire_engineer",
    "environmental_impact_assessment_engineer", "tax_accountant", "physician",
)  # fmt: skip
_CEVAL_HARD = (
    "advanced_mathematics", "discrete_mathematics", "probability_and_statistics",
    "college_physics", "college_chemistry", "high_school_mathematics", "high_school_physics",
    "high_school_chemistry",
)  # fmt: skip

CEVAL = Benchmark(
    name="ceval",
    title="C-Eval",
    data="ceval/ceval-exam",
    # the labels of the test split are not public
    split="val",
    folder="ceval",
    prefix="ceval-valid_",
    # means over subjects, as C-Eval's leaderboard forms them
    groups=(
        Group("STEM", _CEVAL_STEM, "subjects"),
        Group("Social Science", _CEVAL_SOCIAL_SCIENCE, "subjects"),
        Group("Humanities", _CEVAL_HUMANITIES, "subjects"),
        Group("Other", _CEVAL_OTHER, "subjects"),
        Group("Hard", _CEVAL_HARD, "subjects"),
        Group("average", None, "subjects"),
    ),
    chance=0.25,
)

MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    data="cais/mmlu",
    split="test",
    folder="mmlu/default",
    prefix="mmlu_",
    # means over questions, as MMLU's authors and lm-eval form them
    groups=(
        Group("STEM", "mmlu_stem_tasks", "questions"),
        Group("Humanities", "mmlu_humanities_tasks", "questions"),
        Group("Social Sciences", "mmlu_social_sciences_tasks", "questions"),
        Group("Other", "mmlu_other_tasks", "questions"),
        Group("average", None, "questions"),
        Group("average of subjects", None, "subjects"),
    ),
    chance=0.25,
)

GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    data="openai/gsm8k",
    split="test",
    folder="gsm8k",
    prefix="",
    groups=(
        Group("strict match", ("gsm8k",), "questions", "strict match"),
        Group("flexible extract", ("gsm8k",), "questions", "flexible extract"),
    ),
    chance=0.0,
    in_words=True,
    measures={
        "strict match": Measure("exact_match", "strict-match"),
        "flexible extract": Measure("exact_match", "flexible-extract"),
    },
)

BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in (CEVAL, MMLU, GSM8K)}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            f"there is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}."
            f"{did_you_mean(name, list(BENCHMARKS))}"
        )
    return BENCHMARKS[name]
