"""The two scales of the reproduction: what a small machine can do, and what the paper did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from cgfedllm.config import Config, load_config
from cgfedllm.errors import ConfigError


@dataclass(frozen=True)
class Scale:
    """Experiments of one size.

    Parameters
    ----------
    name : str
        "small" or "paper".
    experiments : tuple of str
        Their configurations, files in `configs/`; the first is the default.
    per_subject : int or None
        Questions asked of a subject of C-Eval and MMLU; None is all of them.
    """

    name: str
    experiments: tuple[str, ...]
    per_subject: int | None


SCALES = {
    scale.name: scale
    for scale in (
        Scale("small", ("small",), per_subject=5),
        Scale("paper", ("llama-dolly", "llama-ceval", "qwen-mmlu"), per_subject=None),
    )
}


def find_scale(name: str) -> Scale:
    """A scale by its name.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    try:
        return SCALES[name]
    except KeyError:
        raise ConfigError(f"scale is one of {', '.join(SCALES)}; got {name!r}") from None


def experiment_config(
    scale: Scale, experiment: str | None = None, overrides: Iterable[str] = ()
) -> Config:
    """Configuration of an experiment as it ships, with overrides as `load_config` takes them.

    Raises
    ------
    ConfigError
        If the scale has no such experiment, or as `load_config`.
    """
    name = experiment or scale.experiments[0]
    if name not in scale.experiments:
        raise ConfigError(
            f"scale {scale.name!r} has the experiments {', '.join(scale.experiments)}; got {name!r}"
        )
    shipped = resources.files(__package__) / "configs" / f"{name}.toml"
    with resources.as_file(shipped) as path:
        return load_config(path, overrides)
