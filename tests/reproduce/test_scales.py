"""The scales of the reproduction: what ships, and that it is what the paper says."""

from importlib import resources

import pytest

from cgfedllm.errors import ConfigError
from cgfedllm.plan import make_plan
from cgfedllm.reproduce.rows import ROWS
from cgfedllm.reproduce.scales import SCALES, experiment_config, find_scale

EXPERIMENTS = [(scale.name, name) for scale in SCALES.values() for name in scale.experiments]


@pytest.mark.parametrize(("scale", "name"), EXPERIMENTS)
def test_each_experiment_is_named_after_its_file_and_opens_with_its_command(
    scale: str, name: str
) -> None:
    assert experiment_config(find_scale(scale), name).name == name
    text = (resources.files("cgfedllm.reproduce") / "configs" / f"{name}.toml").read_text()
    assert text.startswith(f"# cgfedllm reproduce paper --scale {scale}")


@pytest.mark.parametrize(
    ("name", "rounds", "clients", "fraction", "batch", "micro", "lr", "rank", "epochs"),
    [
        ("llama-dolly", 20, 100, 0.05, 32, 16, 1.5e-4, 8, 1),
        ("llama-ceval", 5, 3, 1.0, 24, 8, 2.0e-4, 16, 3),
        ("qwen-mmlu", 8, 3, 1.0, 8, 4, 3.5e-4, 8, 2),
    ],
)
def test_paper_set_ups_have_the_papers_numbers(
    name: str,
    rounds: int,
    clients: int,
    fraction: float,
    batch: int,
    micro: int,
    lr: float,
    rank: int,
    epochs: int,
) -> None:
    config = experiment_config(find_scale("paper"), name)
    assert config.federation.rounds == rounds
    assert config.data.partition.clients == clients
    assert config.federation.fraction_train == fraction
    assert config.training.batch_size == batch
    assert config.training.micro_batch_size == micro
    assert config.training.lr == lr
    assert config.lora.rank == rank
    assert config.training.local_epochs == epochs
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(("scale", "name"), EXPERIMENTS)
def test_each_experiment_has_a_plan_for_each_row_that_is_federated(scale: str, name: str) -> None:
    base = experiment_config(find_scale(scale), name)
    plan = make_plan(base)
    assert plan.model.trained > 0
    names = {row.config(base, "codec.safetensors").name for row in ROWS}
    assert len(names) == len(ROWS)  # no row takes another one's folder
    parts = {row.config(base, "codec.safetensors").data.part for row in ROWS}
    assert parts == {"d2"}  # D1 is for codecs alone


def test_rows_are_the_papers_and_three_auto_encoders_in_two_presets() -> None:
    assert [row.key for row in ROWS[:3]] == ["base", "centralised", "fedavg"]
    found = {(row.codec, row.preset) for row in ROWS if row.codec and row.benchmarks}
    assert found == {
        (c, p) for c in ("cg_cnn", "cg_resnet", "cg_unet") for p in ("printed", "fair")
    }


def test_overrides_reach_the_experiment() -> None:
    config = experiment_config(find_scale("small"), None, ["federation.rounds=3"])
    assert config.federation.rounds == 3


def test_unknown_scales_and_experiments() -> None:
    with pytest.raises(ConfigError, match="small, paper"):
        find_scale("huge")
    with pytest.raises(ConfigError, match="llama-dolly"):
        experiment_config(find_scale("paper"), "small")
