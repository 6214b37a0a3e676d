"""TGAP from recordings to a codec file: split, fit, measure, write down."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from cgfedllm import events, storage
from cgfedllm.analysis.candidates import parse_codec
from cgfedllm.analysis.pool_fidelity import PoolFidelity, measure_pool
from cgfedllm.analysis.portable import provenance
from cgfedllm.analysis.trials import candidate_label
from cgfedllm.codecs import CodecState, codec_class, codec_names, make_codec
from cgfedllm.codecs.learning import FitProgress, FitSettings, LearnedCodec
from cgfedllm.config import WITHOUT_FLUSH, Config
from cgfedllm.errors import (
    CheckpointError,
    ConfigError,
    PrivacyError,
    RunInterrupted,
    StorageError,
)
from cgfedllm.interrupt import check_interrupt, stoppable
from cgfedllm.report.model_card import POOLS, cost_text, fidelity_text, make_card, write_card
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.codec_file import CodecFile, is_codec_file, load_codec_file, save_codec_file
from cgfedllm.tgap.cost import CollectingCost, collecting_cost
from cgfedllm.tgap.ensemble import EnsembleSettings, Pools, check_length, draw_pools
from cgfedllm.tgap.fit_checkpoint import check_identity, load_fit, save_fit
from cgfedllm.tgap.recording import Recording

FORMAT = 1
SUFFIX = ".safetensors"
# of gradients: more show hardly any other directions
_ROUNDS = 4


@dataclass(frozen=True)
class PretrainResult:
    """A pre-trained codec on the disk.

    Parameters
    ----------
    path : Path
        Its file; the card lies beside it as Markdown.
    folder : Path
        Curve, figure and ``pretrain.json``.
    file : CodecFile
        What is in it.
    """

    path: Path
    folder: Path
    file: CodecFile

    @property
    def card_path(self) -> Path:
        """The model card."""
        return self.path.with_suffix(".md")

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        card = self.file.card
        fit = card["fit"]
        return [
            ("codec file", str(self.path)),
            ("codec", _label(self.file.codec())),
            ("epochs", f"{fit['epochs_run']}, best after {fit['best_epoch']}"),
            *((POOLS[name], fidelity_text(found)) for name, found in card["fidelity"].items()),
            ("cost", cost_text(card["cost"])),
            ("model card", str(self.card_path)),
            *(("note", note) for note in card["notes"]),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {
            "codec_file": str(self.path),
            "card": str(self.card_path),
            "folder": str(self.folder),
            "codec": self.file.name,
            "codec_version": self.file.codec_version,
            "options": self.file.options,
            "spec_hash": self.file.spec.hash.hex(),
            "state_hash": self.file.state.hash.hex(),
            **self.file.card,
        }


class Pretraining:
    """One pre-training: of one codec, into one codec file.

    Parameters
    ----------
    config : Config
        The experiment; its table ``[tgap]`` says how.
    codec : str
        ``NAME`` or ``NAME:key=value,...``; a bare name that is the configuration's own uplink
        codec keeps the options it has there.
    to : path-like, optional
        The codec file; ``OUTPUT/NAME-tgap/codec.safetensors`` by default. What else is written
        goes into the folder of that name without the suffix.
    collects : bool
        Whether updates are collected first.

    Raises
    ------
    ConfigError
        If the codec does not exist, refuses an option or learns nothing, or `to` is no place for
        a codec file.
    """

    def __init__(
        self, config: Config, codec: str, to: Path | str | None = None, *, collects: bool
    ) -> None:
        self._config = config
        self._codec = learned_codec(config, codec)
        self._collects = collects
        name = f"{config.name}-tgap"
        if to is None:
            self.folder = Path(config.output) / name
            self.path = self.folder / f"codec{SUFFIX}"
        else:
            self.path = Path(to)
            self.folder = self.path.with_suffix("")
            if self.path.suffix != SUFFIX or self.path.is_dir():
                raise ConfigError(f"--to names the codec file, NAME{SUFFIX}; got {self.path}")
        self._settings = EnsembleSettings.of(config)
        if collects:
            self._check_collecting()

    @property
    def collecting(self) -> Config:
        """Configuration of the run that collects updates: on D1, not evaluated."""
        tgap, rounds = self._config.tgap, self._config.federation.rounds
        gradients = tgap.optimizer == "sgd" or (
            tgap.optimizer == "auto" and self._codec.learns_gradients
        )
        little = gradients and self._codec.learns_gradients
        codec = tgap.codec
        if codec == "auto":
            codec = "int4" if little and tgap.collect == "federated" else "raw"
        return self._config.with_overrides(
            {
                "name": f"{self._config.name}-tgap",
                "data.part": "d1",
                "federation.rounds": tgap.rounds or (min(rounds, _ROUNDS) if little else rounds),
                "uplink.name": codec,
                "uplink.options": {},
                **_WITHOUT_LEARNING,
                "evaluation.every": 0,
                "evaluation.heldout": False,
                "evaluation.clients": False,
                **(self._plain_gradients() if gradients else {}),
            }
        )

    def begin(self, overwrite: bool) -> None:
        """Make room, or verify that what is there is of this pre-training.

        Raises
        ------
        CheckpointError
            If another one is there and `overwrite` is False, or the codec file's place is taken
            by something else.
        StorageError
            If what is there cannot be removed.
        """
        if self.path.exists() and not is_codec_file(self.path):
            raise CheckpointError(f"{self.path} is no codec file, so it is not replaced")
        if overwrite:
            if self.folder.exists():
                with RunFolder(self.folder):
                    self._discard()
            return
        known = self._identity()
        if self._checkpoint.exists():
            load_fit(self._checkpoint, known)
        elif self._report.exists():
            check_identity(self._reported().get("identity"), known, self._report)
        elif self.path.exists():
            raise CheckpointError(
                f"{self.path} exists already; write elsewhere (--to), or replace it with "
                "--overwrite"
            )

    def run(self, recordings: Sequence[Recording]) -> PretrainResult:
        """Fit, measure and write; one that is complete is returned as it is.

        Raises
        ------
        RecordingError
            If the recordings cannot be used together or not be split, or one is damaged.
        CheckpointError
            If a fit of other updates or settings is there.
        CodecStateError
            If the codec finds nothing to learn from.
        RunInterrupted
            After Ctrl-C; the same call goes on after the last epoch.
        """
        pools = draw_pools(recordings, self._settings)
        identity = self._identity(recordings)
        with RunFolder(self.folder):
            storage.remove_leftovers(self.folder)
            if self._is_complete():
                check_identity(self._reported().get("identity"), identity, self._report)
                return PretrainResult(self.path, self.folder, load_codec_file(self.path))
            notes = [*pools.notes, *_provenance(recordings)]
            for note in notes:
                events.publish(events.Notice(note))
            try:
                with stoppable("epoch"):
                    state, progress = self._fit(pools, identity)
                    fidelity = self._measure(pools, state)
            except RunInterrupted:
                raise RunInterrupted(
                    f"stopped; what was learned up to the last full epoch is kept in "
                    f"{self.folder}, and the same command goes on"
                ) from None
            return self._write(recordings, pools, state, progress, fidelity, notes, identity)

    def _fit(self, pools: Pools, identity: Mapping[str, Any]) -> tuple[CodecState, FitProgress]:
        resume = load_fit(self._checkpoint, identity)
        done = len(resume.curve) if resume else 0
        last = resume
        settings = FitSettings(
            self._config.tgap.epochs, self._config.tgap.patience, self._settings.seed
        )
        updates, others = len(pools.train), len(pools.validation)
        label = _label(self._codec)
        events.publish(events.FitStarted(label, settings.epochs, updates, others, done))

        def keep(progress: FitProgress) -> None:
            nonlocal last
            save_fit(self._checkpoint, progress, identity)
            last = progress
            events.publish(events.FitEpoch(dict(progress.curve[-1]), progress.best))
            check_interrupt()

        state = self._codec.fit(
            pools.train, pools.validation, settings, resume=resume, on_epoch=keep
        )
        assert last is not None  # every codec tells of every epoch
        self._codec.check_state(state, pools.train.spec)
        return state, last

    def _measure(self, pools: Pools, state: CodecState) -> dict[str, PoolFidelity]:
        found = {}
        for name, pool in pools.named().items():

            def tick(done: int, total: int, what: str = POOLS[name]) -> None:
                events.publish(events.EvaluationProgress(what, done, total))
                check_interrupt()

            found[name] = measure_pool(
                self._codec, state, pool, seed=self._settings.seed, tick=tick
            )
        return found

    def _write(
        self,
        recordings: Sequence[Recording],
        pools: Pools,
        state: CodecState,
        progress: FitProgress,
        fidelity: Mapping[str, PoolFidelity],
        notes: Sequence[str],
        identity: Mapping[str, Any],
    ) -> PretrainResult:
        from cgfedllm.report.figures.pretraining import plot_fit

        tgap = self._config.tgap
        cost: CollectingCost = collecting_cost(recordings)
        card = make_card(
            recordings,
            splits=pools.describe(),
            fit={
                **self._settings.to_dict(),
                "epochs": tgap.epochs,
                "patience": tgap.patience,
                "epochs_run": len(progress.curve),
                "best_epoch": progress.best,
            },
            fidelity={name: found.to_dict() for name, found in fidelity.items()},
            cost=cost.to_dict(float(progress.curve[-1]["seconds"])),
            notes=notes,
        )
        file = save_codec_file(self.path, self._codec, state, pools.train.spec, card)
        write_card(self.path.with_suffix(".md"), file, self.path)
        storage.write_atomic(self.folder / "curve.csv", _csv(progress.curve))
        plot_fit(progress.curve, progress.best, _label(self._codec), self.folder / "curve")
        # last: with it the pre-training is complete
        storage.write_json(
            self._report,
            {
                "format": FORMAT,
                **provenance(self._config),
                "identity": identity,
                "codec_file": self.path.name,
                "state_hash": state.hash.hex(),
                "spec_hash": file.spec.hash.hex(),
                **card,
                "splits": pools.describe(),  # with the clients' names, which a card leaves out
                "curve": [dict(row) for row in progress.curve],
            },
        )
        self._checkpoint.unlink(missing_ok=True)
        return PretrainResult(self.path, self.folder, file)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / f"fit{SUFFIX}"

    @property
    def _report(self) -> Path:
        return self.folder / "pretrain.json"

    def _is_complete(self) -> bool:
        return self._report.exists() and self.path.exists() and not self._checkpoint.exists()

    def _reported(self) -> dict[str, Any]:
        found = storage.read_json(self._report)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise CheckpointError(f"{self._report} is not of a pre-training; use --overwrite")
        return found

    def _identity(self, recordings: Sequence[Recording] | None = None) -> dict[str, Any]:
        """What makes two pre-trainings the same; without recordings, as far as it is known."""
        tgap = self._config.tgap
        known: dict[str, Any] = {
            "collected": tgap.collect if self._collects else None,
            "codec": self._codec.name,
            "codec_version": self._codec.version,
            "options": self._codec.options.model_dump(mode="json"),
            "settings": {
                **self._settings.to_dict(),
                "epochs": tgap.epochs,
                "patience": tgap.patience,
            },
        }
        if recordings is not None:
            known["recordings"] = [recording.fingerprint for recording in recordings]
        # as it is read back: tuples are lists there
        plain: dict[str, Any] = json.loads(json.dumps(known))
        return plain

    def _check_collecting(self) -> None:
        """What would only be found after hours of collecting is found now."""
        if self._config.privacy.secagg.enabled:
            raise ConfigError(
                "privacy.secagg keeps single updates from the server, and pre-training collects "
                "them; pre-train with --set privacy.secagg.enabled=false on rows of D1 that may be "
                "learned from, or give a --recording of updates that may be seen"
            )
        config = self.collecting
        if self._settings.span > 1 and self._config.tgap.collect == "federated":
            raise ConfigError(
                f"tgap.span = {self._settings.span} needs updates that follow one another; with "
                "tgap.collect = 'federated' they do not. Set it to centralised or local-only"
            )
        if self._noise_comes_too_late():
            raise PrivacyError(
                f"with privacy.mechanism = {self._config.privacy.mechanism!r} and tgap.collect = "
                f"{self._config.tgap.collect!r} updates are kept before any noise, and what a "
                "codec learns from them goes to all clients. Set privacy.mechanism = 'local' and "
                "tgap.collect = 'federated', or give a --recording that need not be protected"
            )
        what = f"collecting (tgap.rounds = {config.federation.rounds})"
        check_length(config.federation.rounds, self._settings, what)

    def _plain_gradients(self) -> dict[str, Any]:
        return {
            "training.optimizer": "sgd",
            "training.lr": 1.0,
            "training.schedule": "constant",
            "training.warmup_rounds": 0.0,
            "training.momentum": 0.0,
            "training.weight_decay": 0.0,
            # a rate of 1 is for gradients of limited length
            "training.max_grad_norm": self._config.training.max_grad_norm or 1.0,
            "training.keep_optimizer": False,
            "federation.server_lr": 1.0,
        }

    def _noise_comes_too_late(self) -> bool:
        mechanism = self._config.privacy.mechanism
        return mechanism != "none" and (mechanism, self._config.tgap.collect) != (
            "local",
            "federated",
        )

    def _discard(self) -> None:
        try:
            for file in (
                self._report,
                self._checkpoint,
                self.path,
                self.path.with_suffix(".md"),
                *(self.folder / f"curve.{kind}" for kind in ("csv", "png", "svg")),
            ):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot clear {self.folder}: {error}") from error


_WITHOUT_LEARNING: dict[str, Any] = {
    **WITHOUT_FLUSH,
    "uplink.state": None,
    "uplink.clients_hold_state": False,
    "uplink.adapt_every": 0,
    "uplink.error_feedback": False,
    "training.subspace": False,
}


def learned_codec(config: Config, text: str) -> LearnedCodec:
    """The codec that ``NAME[:key=value,...]`` names, if it is one that learns.

    Raises
    ------
    ConfigError
        If it does not exist, refuses an option, or learns nothing.
    """
    # what the configuration goes on to do with a codec does not bear on how it is fitted
    base = config.with_overrides(
        {
            **_WITHOUT_LEARNING,
            "uplink.state": config.uplink.state,
            "privacy.secagg.enabled": False,
        }
    )
    changed = parse_codec(text, base).config(base).uplink
    if not issubclass(codec_class(changed.name), LearnedCodec):
        learning = [n for n in codec_names() if issubclass(codec_class(n), LearnedCodec)]
        raise ConfigError(
            f"codec {changed.name!r} learns nothing, so there is nothing to pre-train; codecs "
            f"that learn: {', '.join(learning) or 'none is installed'}"
        )
    codec = make_codec(changed.name, changed.options)
    assert isinstance(codec, LearnedCodec)
    return codec


def _label(codec: LearnedCodec) -> str:
    """Name and those options that are not the defaults."""
    return candidate_label(codec.name, codec.options.model_dump(mode="json", exclude_defaults=True))


def _provenance(recordings: Sequence[Recording]) -> list[str]:
    """What whoever uses the codec should know of where its updates come from."""
    notes = []
    parts = sorted({recording.config.data.part for recording in recordings} - {"d1"})
    if parts:
        notes.append(
            f"updates were recorded with data.part = {', '.join(parts)}, not d1: a run on rows "
            "that were recorded from is no fair test of this codec"
        )
    lossy = sorted(
        {name for r in recordings if not codec_class(name := r.config.uplink.name).lossless}
    )
    if lossy:
        notes.append(f"updates are as decoded from packets of {', '.join(lossy)}")
    mechanisms = {recording.config.privacy.mechanism for recording in recordings}
    if "local" in mechanisms:
        notes.append(
            "updates were recorded under local differential privacy: what that spent comes on top "
            "of what runs with this codec spend"
        )
    if "central" in mechanisms:
        notes.append(
            "updates were recorded before the server added noise: central differential privacy "
            "does not cover this codec"
        )
    return notes


def _csv(curve: Sequence[Mapping[str, float]]) -> str:
    out = StringIO()
    writer = csv.DictWriter(out, list(curve[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in curve)
    return out.getvalue()
