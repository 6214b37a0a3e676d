"""Fair tuning: every candidate gets the same grid of trials, and none sees a held-out row.

A trial is a run of its own, with a seed that is none of those compared, on the comparison's own
split. It is judged by the NLL on the clients' validation rows, weighted as in the average of
updates, which is what a run makes small; the global held-out set is not even evaluated. One moment
of a run with large steps says little, so the last quarter of a trial counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cgfedllm.analysis.candidates import Candidate, check_variable, slug_of
from cgfedllm.codecs import codec_class, make_codec
from cgfedllm.config import Config, parse_value
from cgfedllm.errors import ConfigError
from cgfedllm.metrics import RoundRecord
from cgfedllm.pairs import split_outside
from cgfedllm.seeding import derive_seed

SHORT_NAMES = {
    "server_lr": "federation.server_lr",
    "decay": "uplink.error_feedback_decay",
}
JUDGED_ON = (
    "NLL on the clients' validation rows, clients weighted as in the average of updates, mean over "
    "the evaluations in the trial's last quarter"
)
# of a trial; its last quarter has two of them, unless it is very short
_EVALUATIONS = 4
_DECAY = "uplink.error_feedback_decay"
_OPTION = "uplink.options."

Setting = dict[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Axis:
    """One key and the values to try."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Tuning:
    """The grid that every candidate goes through.

    Parameters
    ----------
    axes : tuple of Axis
        The grid is their product.
    rounds : int or None
        Length of a trial; None: as long as the run. A candidate that has other rounds than the
        base configuration gets proportionally as many, so that all trials end equally far in.
    seed : int
        Seed of all trials.
    """

    axes: tuple[Axis, ...]
    rounds: int | None
    seed: int

    def settings(self) -> list[Setting]:
        """All points of the grid, in order."""
        values = itertools.product(*(axis.values for axis in self.axes))
        keys = [axis.key for axis in self.axes]
        return [dict(zip(keys, point, strict=True)) for point in values]

    def trials(self, base: Config, candidate: Candidate) -> list[Trial]:
        """The candidate's trials; settings that come to the same share a run.

        Raises
        ------
        ConfigError
            If the configuration refuses a setting.
        """
        own = candidate.config(base)
        trials = []
        for setting in self.settings():
            used = {key: value for key, value in setting.items() if _matters(own, key)}
            trials.append(Trial(setting, used, self._config(base, candidate, own, used)))
        return trials

    def default(self, base: Config, candidate: Candidate) -> Setting:
        """What the candidate would use untuned, of the keys that are tuned and matter."""
        own = candidate.config(base)
        return {a.key: _value_at(own, a.key) for a in self.axes if _matters(own, a.key)}

    def _config(self, base: Config, candidate: Candidate, own: Config, used: Setting) -> Config:
        rounds = own.federation.rounds
        if self.rounds is not None:
            rounds = max(1, round(self.rounds * rounds / base.federation.rounds))
        point = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in used.items())
        # rounds in the name: trials of another length are others, not the same ones changed
        name = f"{base.name}-{candidate.slug}-tune{rounds}-{slug_of(point or 'default')}"
        return candidate.config(
            base,
            **{
                **used,
                "name": name,
                "seed": self.seed,
                "federation.rounds": rounds,
                "evaluation.every": max(1, rounds // _EVALUATIONS),
                "evaluation.clients": True,
                "evaluation.heldout": False,
            },
        )


@dataclass(frozen=True)
class Trial:
    """One point of the grid for one candidate.

    Parameters
    ----------
    setting : dict
        The point.
    used : dict
        What of it makes a difference to this candidate.
    config : Config
        The run that tries it.
    """

    setting: Setting
    used: Setting
    config: Config = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """How a trial ended: its validation NLL, or why it has none."""

    trial: Trial
    nll: float | None
    clients: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Choice:
    """The setting a candidate is compared with; None if no trial came to an end."""

    verdicts: list[Verdict]
    setting: Setting | None
    is_default: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        rows = []
        first: dict[str, Setting] = {}
        for verdict in self.verdicts:
            name = verdict.trial.config.name
            row: dict[str, Any] = {
                "setting": verdict.trial.setting,
                "run": name,
                "rounds": verdict.trial.config.federation.rounds,
                "validation_nll": verdict.nll,
                "clients": verdict.clients,
            }
            if verdict.failure:
                row["failure"] = verdict.failure
            if name in first:
                row["same_as"] = first[name]
            first.setdefault(name, verdict.trial.setting)
            rows.append(row)
        return {"trials": rows, "chosen": self.setting, "is_default": self.is_default}


def parse_tuning(
    texts: Sequence[str], rounds: int | None, base: Config, seeds: Sequence[int]
) -> Tuning | None:
    """Read ``KEY=value,value,...`` once an axis; None if there is none.

    Parameters
    ----------
    texts : sequence of str
        Keys of the configuration, or "server_lr" and "decay" for short.
    rounds : int, optional
        Length of a trial.
    base : Config
        Its seed is what the trials' one is derived from.
    seeds : sequence of int
        Those compared; the trials' is none of them.

    Raises
    ------
    ConfigError
        If an axis cannot be read, sets what is fixed, or there are no validation rows to judge
        by.
    """
    if not texts:
        if rounds is not None:
            raise ConfigError("--tune-rounds is the length of a trial; say with --tune what to try")
        return None
    if rounds is not None and rounds < 1:
        raise ConfigError(f"--tune-rounds must be at least 1, got {rounds}")
    if base.data.splits.validation == 0:
        raise ConfigError(
            "tuning judges by the clients' validation rows, and there are none; set "
            "data.splits.validation above 0"
        )
    axes = tuple(_parse_axis(text) for text in texts)
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--tune gives a key twice: {', '.join(keys)}")
    seed, tried = _trial_seed(base, 0), 0
    while seed in seeds:
        tried += 1
        seed = _trial_seed(base, tried)
    return Tuning(axes, rounds, seed)


def judge(trial: Trial, records: Sequence[RoundRecord]) -> Verdict:
    """Take the trial's figure from its records; held-out figures are not looked at."""
    evaluated = [record for record in records if record.client_nll and record.round]
    if not evaluated:
        return Verdict(trial, None, failure="no client had a validation row to evaluate")
    last = evaluated[-1]
    late = [record.client_nll for record in evaluated if record.round >= 0.75 * last.round]
    rows = {own.client: own.examples for record in records for own in record.clients}
    uniform = trial.config.federation.weighting == "uniform" or not rows
    typical = 1.0 if uniform else sum(rows.values()) / len(rows)

    def mean(nll: Mapping[str, float]) -> float:
        # a client that was never asked to train has not said how many rows it has
        weights = {name: 1.0 if uniform else rows.get(name, typical) for name in nll}
        return sum(weights[name] * nll[name] for name in nll) / sum(weights.values())

    nll = sum(map(mean, late)) / len(late)
    if not math.isfinite(nll):
        return Verdict(trial, None, len(last.client_nll), f"the validation NLL is {nll}")
    return Verdict(trial, nll, len(last.client_nll))


def choose(verdicts: Sequence[Verdict], default: Mapping[str, Any]) -> Choice:
    """Take the lowest validation NLL; of equals the default, else the first of the grid."""
    usable = [v for v in verdicts if v.nll is not None]
    if not usable:
        return Choice(list(verdicts), None, False)
    # min takes the first of equals, and the grid is in order
    best = min(usable, key=lambda v: (v.nll, v.trial.used != default))
    return Choice(list(verdicts), best.trial.used, best.trial.used == default)


def _trial_seed(base: Config, number: int) -> int:
    return derive_seed(base.seed, "tuning", number) % 2**31


def _parse_axis(text: str) -> Axis:
    key, equals, rest = text.partition("=")
    key = SHORT_NAMES.get(key.strip(), key.strip())
    values = [parse_value(part) for part in split_outside(rest)] if rest.strip() else []
    if not equals or not key or not values or "" in values:
        raise ConfigError(f"--tune wants KEY=value,value, e.g. server_lr=0.7,1,1.4; got {text!r}")
    if "." not in key:
        raise ConfigError(
            f"--tune {text!r}: {key!r} is no key of the configuration, nor one of "
            f"{', '.join(SHORT_NAMES)}"
        )
    check_variable(key, f"--tune {text!r}")
    if len(values) != len(set(map(repr, values))):
        raise ConfigError(f"--tune {text!r} gives a value twice")
    return Axis(key, tuple(values))


def _matters(config: Config, key: str) -> bool:
    """Whether a key makes a difference to this configuration."""
    codec = codec_class(config.uplink.name)
    if key == _DECAY:
        kept = config.uplink.error_feedback and not config.federation.stateless
        return kept and not codec.lossless
    if key.startswith(_OPTION):
        return key.removeprefix(_OPTION) in codec.Options.model_fields
    return True


def _value_at(config: Config, key: str) -> Any:
    if key.startswith(_OPTION):
        options = make_codec(config.uplink.name, config.uplink.options).options
        return getattr(options, key.removeprefix(_OPTION))
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value
