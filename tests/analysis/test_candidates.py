"""What can be compared, and how it is written."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from cgfedllm.analysis.candidates import candidates_of, parse_codec, parse_variant, slug_of
from cgfedllm.analysis.tuning import parse_tuning
from cgfedllm.config import Config, load_config
from cgfedllm.errors import ConfigError

ROOT = Path(__file__).parents[2]
BASE = Config(name="x")


def test_a_codec_with_options() -> None:
    candidate = parse_codec("topk: bpp=0.050 ", BASE)
    assert candidate.label == "topk:bpp=0.05"
    config = candidate.cell(BASE, 3, {})
    assert (config.uplink.name, config.uplink.options) == ("topk", {"bpp": 0.05})
    assert (config.name, config.seed) == ("x-topk-bpp0.05-seed3", 3)


def test_a_bare_codec_has_its_defaults_unless_it_is_the_configured_one() -> None:
    base = BASE.with_overrides({"uplink.name": "topk", "uplink.options": {"bpp": 0.1}})
    assert parse_codec("topk", base).config(base).uplink.options == {"bpp": 0.1}
    assert parse_codec("int8", base).config(base).uplink.options == {}
    other = parse_codec("topk:bpp=0.2", base).config(base)
    assert other.uplink.options == {"bpp": 0.2}


def test_a_variant_changes_settings() -> None:
    candidate = parse_variant(
        'small:lora.rank=2,lora.target_modules=["q_proj","v_proj"],uplink.name=int8', BASE
    )
    config = candidate.cell(BASE, 0, {"federation.server_lr": 0.7})
    assert (config.lora.rank, config.lora.target_modules) == (2, ["q_proj", "v_proj"])
    assert (config.uplink.name, config.federation.server_lr) == ("int8", 0.7)
    assert config.name == "x-small-seed0"


def test_a_variant_of_another_codec_does_not_inherit_options() -> None:
    base = BASE.with_overrides({"uplink.name": "topk", "uplink.options": {"bpp": 0.1}})
    config = parse_variant("a:uplink.name=ecsq,uplink.options.bpp=0.5", base).config(base)
    assert config.uplink.options == {"bpp": 0.5}


def test_settings_on_top_leave_the_candidate_as_it_is() -> None:
    candidate = parse_codec("topk:bpp=0.05", BASE)
    changed = candidate.config(BASE, **{"uplink.options.bpp": 0.2})
    assert changed.uplink.options == {"bpp": 0.2}
    assert candidate.config(BASE).uplink.options == {"bpp": 0.05}


def test_all_seeds_share_the_split_of_the_base() -> None:
    (candidate, _) = candidates_of(BASE, ["raw", "int8"])
    base = BASE.with_overrides({"seed": 7})
    assert {candidate.cell(base, seed, {}).data.seed for seed in (0, 1, 2)} == {7}
    split = BASE.with_overrides({"data.seed": 5})
    assert candidate.cell(split, 1, {}).data.seed == 5


def test_order_and_duplicates() -> None:
    found = candidates_of(BASE, ["raw", "int8", "raw"], ["r:lora.rank=1"], ["centralised"])
    assert [c.label for c in found] == ["raw", "int8", "r", "centralised"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "did you mean 'int"),
        ("int8:", "no key=value"),
        ("int8:bits", "'bits' is no key=value"),
        ("int8:bits=3", "option 'bits'"),
        ("topk:bpp=0.1,bpp=0.2", "'bpp' twice"),
        ("topk:bpp=none", "bpp"),
    ],
)
def test_codecs_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_codec(text, BASE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank2", "LABEL:config.key=value"),
        (":lora.rank=2", "LABEL:config.key=value"),
        ("rank2:lora.rnk=2", "(?s)variant 'rank2'.*did you mean 'lora.rank'"),
        ("rank2:lora.rank=0", "lora.rank"),
        ("more:data.max_rows=9", "keeps the same for all"),
        ("other:model.id=embedded", "keeps the same for all"),
        ("s:seed=3", "keeps the same for all"),
    ],
)
def test_variants_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_variant(text, BASE)


def test_two_candidates_never_share_a_folder() -> None:
    with pytest.raises(ConfigError, match="would share the run folders 'x-int8-"):
        candidates_of(BASE, ["int8"], ["int8:lora.rank=2"])


def test_an_unknown_reference() -> None:
    with pytest.raises(ConfigError, match="centralised, local-only"):
        candidates_of(BASE, ["raw"], references=["both"])


def test_folder_names() -> None:
    assert slug_of("topk:bpp=0.05,positions=fixed") == "topk-bpp0.05-positionsfixed"
    assert slug_of('r:["a", "b"]') == "r-a-b"
    long = [slug_of(f"{'x' * 100}{end}") for end in "ab"]
    assert len(set(long)) == 2
    assert all(len(slug) == 80 for slug in long)


# ---- the commands of docs/codecs.md -------------------------------------------------------------


def documented_comparisons() -> list[list[str]]:
    """Arguments of every `cgfedllm compare` in the page's code blocks."""
    page = (ROOT / "docs" / "codecs.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in re.findall(r"^cgfedllm compare .*", page, re.M)]


def given(arguments: list[str], option: str) -> list[str]:
    return [value for key, value in pairwise(arguments) if key == option]


@pytest.mark.parametrize("arguments", documented_comparisons(), ids=["variants", "codecs"])
def test_documented_comparisons_are_read(arguments: list[str]) -> None:
    base = load_config(ROOT / arguments[0])
    codecs, variants = given(arguments, "--codec"), given(arguments, "--variant")
    found = candidates_of(base, codecs, variants)
    assert [c.label for c in found] == codecs + [v.partition(":")[0] for v in variants]
    tuning = parse_tuning(given(arguments, "--tune"), 4, base, (0, 1, 2))
    assert tuning
    for candidate in found:
        assert len(tuning.trials(base, candidate)) == 2


def test_documented_variants_are_what_they_are_called() -> None:
    arguments = documented_comparisons()[0]
    base = load_config(ROOT / arguments[0])
    steps = base.federation.rounds * (base.training.local_steps or 0)
    for candidate in candidates_of(base, [], given(arguments, "--variant")):
        config = candidate.config(base)
        kind, _, codec = candidate.label.partition("-")
        assert config.uplink.name == codec
        assert config.lora.alpha / config.lora.rank == base.lora.alpha / base.lora.rank
        assert config.federation.rounds * (config.training.local_steps or 0) == steps
        assert {
            f"rank{config.lora.rank}": config.lora.rank < base.lora.rank,
            "ffa": config.lora.freeze_a,
            f"rounds{config.federation.rounds}": config.federation.rounds < base.federation.rounds,
        }[kind]
