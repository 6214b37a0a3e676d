r"""The open-loop bench: recorded updates through every codec at every rate, one by one.

::

    recording --split by round--> earlier (left to codecs that learn)
                              \-> later --encode--> packet --decode--> compared with what went in

Open loop: no update depends on what an earlier packet lost, and there is no error feedback. It
tells what one packet holds, not what a run ends with.
"""

from __future__ import annotations

import json
import math
import statistics
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.coding import Coder, code, previous, swapped, weighted_mean
from cgfedllm.analysis.fidelity import Fidelity, ModuleFidelity
from cgfedllm.analysis.fitted import Fitted
from cgfedllm.analysis.models import factor_components, gaussian_snr_db, spectrum_components
from cgfedllm.analysis.open_loop_rows import ModelRow, ModuleRow, OpenLoop, OpenLoopRow, Refusal
from cgfedllm.analysis.samples import UPDATES, Sample, choose, load_samples
from cgfedllm.analysis.trials import RATES, Trial, trials
from cgfedllm.errors import CodecError, CodecStateError

if TYPE_CHECKING:
    from cgfedllm.tgap.recording import Recording

_MODEL_RATES = np.geomspace(0.01, 10, 31)

PREVIOUS = "(previous)"
PREVIOUS_SCALED = "(previous, scaled)"

Tick = Callable[[str, int], None]
"""Told what is tried, and how many updates are done, those of earlier trials included."""


def measure(
    name: str,
    recording: Recording,
    candidates: Sequence[tuple[str, dict[str, Any]]],
    *,
    rates: Sequence[float] = RATES,
    updates: int = UPDATES,
    seed: int = 0,
    memory: bool = False,
    fitted: Sequence[Fitted] = (),
    tick: Tick = lambda what, done: None,
) -> OpenLoop:
    """Measure every candidate at every rate on one recording.

    Parameters
    ----------
    name : str
        Of the recording, for the results.
    candidates : sequence of (name, options)
        As for `trials`.
    updates : int
        Most updates measured, as for `choose`.
    seed : int
        Common seed of both ends, for codecs that draw numbers.
    memory : bool
        Measure memory too; slows one update of each trial down.
    fitted : sequence of Fitted
        Codec files to measure beside the candidates. One that was fitted on an update that is
        measured here is refused.
    tick : callable
        Told after every update what is tried, and how many updates are done over all trials.

    Returns
    -------
    OpenLoop
        A trial that its codec refuses is among the refusals.

    Raises
    ------
    RecordingError
        If the recording is too short.
    """
    tried = trials(candidates, rates, fitted)
    chosen = choose(recording, updates)
    starts = any(trial.uses_start for trial in tried)
    samples = load_samples(recording, chosen, seed=seed, starts=starts)
    n_updates = sum(len(group) for group in samples.values())
    result = OpenLoop(name, tuple(chosen))
    result.models.extend(_model_rows(name, samples))
    result.rows.extend(_reference_rows(name, samples))
    measured = [sample for group in samples.values() for sample in group]
    for number, trial in enumerate(tried):
        options = json.dumps(trial.described)
        try:
            if trial.fitted is not None:
                trial.fitted.check_unseen(recording, measured)
            outcome = _run(trial, samples, seed, memory, number * n_updates, tick)
        except (CodecError, CodecStateError) as error:
            result.refusals.append(Refusal(name, trial.codec, options, trial.asked_bpp, str(error)))
            continue
        row = outcome.row(name, trial, recording.spec.size)
        result.rows.append(row)
        energy = outcome.modules.total().signal
        for module, fidelity in outcome.modules.kinds.items():
            result.modules.append(
                ModuleRow(
                    recording=name,
                    codec=trial.codec,
                    options=options,
                    asked_bpp=trial.asked_bpp,
                    bpp=row.bpp,
                    module=module,
                    snr_db=fidelity.snr_db,
                    cosine=fidelity.cosine,
                    energy_share=fidelity.signal / energy if energy > 0 else math.nan,
                )
            )
    return result


@dataclass
class _Outcome:
    """Sums over the updates of one trial."""

    modules: ModuleFidelity
    aggregate: Fidelity = field(default_factory=Fidelity)
    swapped: Fidelity = field(default_factory=Fidelity)
    sizes: list[int] = field(default_factory=list)
    encode_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    peak: int | None = None

    def row(self, recording: str, trial: Trial, parameters: int) -> OpenLoopRow:
        bpp = 8 * statistics.fmean(self.sizes) / parameters
        clients = self.modules.total()
        return OpenLoopRow(
            recording=recording,
            codec=trial.codec,
            options=json.dumps(trial.described),
            asked_bpp=trial.asked_bpp,
            bpp=bpp,
            times_fewer_than_fp32=32 / bpp,
            snr_db=clients.snr_db,
            cosine=clients.cosine,
            aggregate_snr_db=self.aggregate.snr_db,
            aggregate_cosine=self.aggregate.cosine,
            swap_snr_db=self.swapped.snr_db,
            encode_ms=_median_after_first(self.encode_ms),
            decode_ms=_median_after_first(self.decode_ms),
            peak_extra_bytes=self.peak,
            updates=len(self.sizes),
            n_parameters=parameters,
        )


def _run(
    trial: Trial,
    samples: dict[int, list[Sample]],
    seed: int,
    memory: bool,
    before: int,
    tick: Tick,
) -> _Outcome:
    first = next(iter(samples.values()))[0]
    coder = trial.make(first.update.spec, seed)
    outcome = _Outcome(ModuleFidelity(first.update.spec))
    if memory:
        outcome.peak = _peak_bytes(coder, first)
    for group in samples.values():
        coded = []
        for sample in group:
            coded.append(code(coder, sample))
            outcome.sizes.append(coded[-1].size)
            outcome.encode_ms.append(coded[-1].encode_ms)
            outcome.decode_ms.append(coded[-1].decode_ms)
            outcome.modules.add(sample.update, coded[-1].decoded)
            tick(trial.label, before + len(outcome.sizes))
        _compare_group(outcome, group, [one.decoded for one in coded])
    return outcome


def _compare_group(outcome: _Outcome, group: list[Sample], decoded: list[AdapterUpdate]) -> None:
    """Aggregate and swap test of one round."""
    true = [sample.update for sample in group]
    weights = [sample.weight for sample in group]
    means = weighted_mean(true, weights), weighted_mean(decoded, weights)
    outcome.aggregate.add(*(mean.vector for mean in means))
    for x, y in swapped(true, decoded):
        outcome.swapped.add(x.vector, y.vector)


def _reference_rows(recording: str, samples: dict[int, list[Sample]]) -> Iterator[OpenLoopRow]:
    """What one knows without any packet: the aggregate of the round before.

    As it is, and with the scale that fits all measured updates best, which no receiver knows:
    an upper bound for predicting by a multiple of it.
    """
    groups = [g for g in samples.values() if g[0].context.previous is not None]
    if not groups:
        return
    pairs = [(sample.update.vector, previous(sample)) for group in groups for sample in group]
    plain = Fidelity()
    for x, y in pairs:
        plain.add(x, y)
    best = plain.inner / plain.decoded if plain.decoded > 0 else 0.0
    for label, scale in ((PREVIOUS, 1.0), (PREVIOUS_SCALED, best)):
        outcome = _Outcome(ModuleFidelity(groups[0][0].update.spec))
        for group in groups:
            guess = [
                AdapterUpdate(sample.update.spec, np.float32(scale) * previous(sample))
                for sample in group
            ]
            for sample, update in zip(group, guess, strict=True):
                outcome.modules.add(sample.update, update)
            _compare_group(outcome, group, guess)
        clients = outcome.modules.total()
        yield OpenLoopRow(
            recording=recording,
            codec=label,
            options=json.dumps({"scale": scale}),
            asked_bpp=None,
            bpp=0.0,
            times_fewer_than_fp32=math.inf,
            snr_db=clients.snr_db,
            cosine=clients.cosine,
            aggregate_snr_db=outcome.aggregate.snr_db,
            aggregate_cosine=outcome.aggregate.cosine,
            swap_snr_db=outcome.swapped.snr_db,
            encode_ms=0.0,
            decode_ms=0.0,
            peak_extra_bytes=None,
            updates=len(pairs),
            n_parameters=groups[0][0].update.spec.size,
        )


def _model_rows(recording: str, samples: dict[int, list[Sample]]) -> Iterator[ModelRow]:
    """Curves of the models, their variances taken from the very updates that are measured."""
    updates = [sample.update for group in samples.values() for sample in group]
    curves = {
        "model: iid Gaussian": gaussian_snr_db(_MODEL_RATES),
        "model: a variance per factor": factor_components(updates).snr_db(_MODEL_RATES),
        "model: a variance per singular component": spectrum_components(updates).snr_db(
            _MODEL_RATES
        ),
    }
    for model, values in curves.items():
        for bpp, snr in zip(_MODEL_RATES, values, strict=True):
            yield ModelRow(recording, model, float(bpp), float(snr))


def _peak_bytes(codec: Coder, sample: Sample) -> int:
    """Most memory that Python and NumPy took at once for one update and its way back."""
    tracemalloc.start()
    try:
        codec.decode(codec.encode(sample.update, sample.context), sample.context)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _median_after_first(times: list[float]) -> float:
    """The first call loads and allocates what the others find ready."""
    return statistics.median(times[1:] or times)
