"""The model card of a pre-trained codec: as data inside its file, as Markdown beside it.

It goes wherever the codec goes, to all clients for one, so it names no client and no folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from cgfedllm import __version__
from cgfedllm.analysis.portable import portable_tree
from cgfedllm.codecs import codec_class
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import Config
from cgfedllm.errors import CodecError, CodecStateError
from cgfedllm.report.units import count_of, human_bytes, human_seconds
from cgfedllm.storage import write_atomic
from cgfedllm.tgap.recording import Recording

if TYPE_CHECKING:
    from cgfedllm.tgap.codec_file import CodecFile

POOLS = {
    "train": "trained on",
    "unseen_rounds": "unseen rounds (judged by while fitting)",
    "unseen_clients": "unseen clients (judged by while fitting)",
    "unseen_both": "unseen rounds of unseen clients (nothing was chosen by them)",
}
"""Pools of updates as people are told of them."""


def recording_facts(recording: Recording) -> dict[str, Any]:
    """Where updates come from: plain types, without folders and without names of clients."""
    config: Config = recording.config
    tree = portable_tree(config)
    training = tree["training"]
    return {
        "kind": recording.kind,
        "fingerprint": recording.fingerprint,
        "updates": len(recording),
        "rounds": len(recording.rounds()),
        "clients": len(recording.clients()),
        "steps": sorted({entry.steps for entry in recording.entries}),
        "model": tree["model"]["id"],
        "lora": tree["lora"],
        "data": {
            "source": tree["data"]["source"],
            "partition": config.data.partition.kind,
            "part": config.data.part,
            "d1_share": config.data.d1_share,
            "split_seed": config.seed if config.data.seed is None else config.data.seed,
        },
        "training": {
            key: training[key]
            for key in ("optimizer", "lr", "batch_size", "schedule", "keep_optimizer")
        },
        "seed": config.seed,
    }


def make_card(
    recordings: Sequence[Recording],
    *,
    splits: Mapping[str, Mapping[str, Any]],
    fit: Mapping[str, Any],
    fidelity: Mapping[str, Mapping[str, Any]],
    cost: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything a codec file tells of itself beyond what is needed to use it.

    Parameters
    ----------
    recordings : sequence of Recording
        What it was fitted on.
    splits : mapping
        As `Pools.describe`; of clients only the number is kept.
    fit : mapping
        Settings and outcome of the fit.
    fidelity : mapping
        As `PoolFidelity.to_dict`, by pool.
    cost : mapping
        As `CollectingCost.to_dict`.
    notes : sequence of str
        What a reader should know.
    """
    return {
        "made_by": f"cgfedllm {__version__}",
        "recordings": [recording_facts(recording) for recording in recordings],
        "splits": {
            name: {**facts, "clients": len(facts["clients"])} for name, facts in splits.items()
        },
        "fit": dict(fit),
        "fidelity": {name: dict(found) for name, found in fidelity.items()},
        "cost": dict(cost),
        "notes": list(notes),
    }


def write_card(path: Path, file: CodecFile, place: Path) -> None:
    """Write the card as Markdown.

    Parameters
    ----------
    path : Path
        Where to.
    file : CodecFile
        The codec.
    place : Path
        Where its file lies; only the name is told.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_atomic(path, card_markdown(file, place.name))


def card_markdown(file: CodecFile, name: str) -> str:
    """The card of a codec file of that name."""
    parts = [
        f"# Codec `{file.name}`, pre-trained",
        _what_it_is(file, name),
        "## Adapter",
        _adapter(file),
        "## Learned from",
        *(_recording(facts) for facts in file.card.get("recordings", [])),
        _splits(file.card.get("splits", {})),
        _fit(file.card.get("fit", {})),
        "## Fidelity",
        _fidelity(file.card.get("fidelity", {})),
        "## Cost",
        _cost(file.card.get("cost", {})),
        "## Use",
        _use(file, name),
    ]
    notes = file.card.get("notes", [])
    if notes:
        parts += ["## Notes", "\n".join(f"- {note[:1].upper()}{note[1:]}." for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def options_text(options: Mapping[str, Any]) -> str:
    """A codec's options; those that are not set are left out."""
    return (
        ", ".join(f"{key}={value}" for key, value in options.items() if value is not None) or "none"
    )


def fidelity_text(found: Mapping[str, Any]) -> str:
    """One pool's figures in a line."""
    return (
        f"SNR {_number(found.get('snr_db'), '.2f')} dB, "
        f"cosine {_number(found.get('cosine'), '.3f')}, "
        f"{_number(found.get('bpp'), '.4g')} bits per parameter "
        f"({count_of(found.get('updates', 0), 'update')})"
    )


def cost_text(cost: Mapping[str, Any]) -> str:
    """Bytes and time in a line."""
    seconds = cost.get("collect_seconds")
    return (
        f"uplink {human_bytes(cost.get('uplink_bytes', 0))}, "
        f"downlink {human_bytes(cost.get('downlink_bytes', 0))}, "
        f"collecting {human_seconds(seconds) if seconds is not None else 'unknown'}, "
        f"fitting {human_seconds(cost.get('fit_seconds', math.nan))}"
    )


def _what_it_is(file: CodecFile, name: str) -> str:
    try:
        summary = f": {codec_class(file.name).summary}"
    except CodecError:
        summary = ""  # not known to this installation
    options = options_text(file.options)
    return (
        f"`{name}` holds what a codec learned from recorded LoRA updates (TGAP, the first stage of "
        f"CG-FedLLM, Wu et al., arXiv 2405.13746). The codec is `{file.name}`, version "
        f"{file.codec_version}{summary}.\n\n"
        f"Options: {options}. State {file.state.version}, hash `{file.state.hash.hex()}`. "
        f"Made by {file.card.get('made_by', '?')}."
    )


def _adapter(file: CodecFile) -> str:
    ranks = sorted({f.shape[0] if f.kind == "A" else f.shape[-1] for f in file.spec if f.kind})
    modules = sorted({factor.module.rsplit(".", 1)[-1] for factor in file.spec})
    return (
        f"{file.spec.size:,} parameters in {count_of(len(file.spec), 'factor')}; rank "
        f"{', '.join(map(str, ranks)) or '-'} on {', '.join(modules)}. "
        f"Spec hash `{file.spec.hash.hex()}`. It codes updates of this adapter and of no other."
    )


def _recording(facts: Mapping[str, Any]) -> str:
    data, training = facts["data"], facts["training"]
    steps = ", ".join(map(str, facts["steps"]))
    part = f", {data['part']} ({data['d1_share']:g})" if data["part"] != "all" else ", all rows"
    return (
        f"A {facts['kind']} recording of {facts['model']} on {data['source']}{part}, "
        f"{data['partition']} partition, seed {facts['seed']}: "
        f"{count_of(facts['updates'], 'update')} of {count_of(facts['clients'], 'client')} over "
        f"{count_of(facts['rounds'], 'round')}, {steps} local steps each "
        f"({training['optimizer']}, lr {training['lr']:g}, batch {training['batch_size']}). "
        f"Fingerprint `{facts['fingerprint']}`."
    )


def _splits(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"| {POOLS.get(name, name)} | {facts['updates']} | {facts['clients']} "
        f"| {'; '.join(_span(rounds) for rounds in facts['rounds'])} |"
        for name, facts in splits.items()
    ]
    head = "| updates | number | clients | rounds |\n|---|---|---|---|"
    return "\n".join([head, *rows]) if rows else ""


def _fit(fit: Mapping[str, Any]) -> str:
    if not fit:
        return ""
    return (
        f"{count_of(fit['epochs_run'], 'epoch')} of at most {fit['epochs']}, the state after epoch "
        f"{fit['best_epoch']} was kept (patience {fit['patience']}). Sampling: {fit['sampling']}, "
        f"stride {fit['stride']}, span {fit['span']}, seed {fit['seed']}."
    )


def _fidelity(fidelity: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"| {POOLS.get(name, name)} | {_number(found['snr_db'], '.2f')} "
        f"| {_number(found['cosine'], '.3f')} | {_number(found['bpp'], '.4g')} "
        f"| {found['updates']} |"
        for name, found in fidelity.items()
    ]
    return "\n".join(
        [
            "| updates | SNR dB | cosine | bits per parameter | coded |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Updates encoded to real packets and decoded again. SNR is 10 log10 of summed squares "
            "of the updates over summed squares of the errors: 0 dB is what predicting nothing "
            "gets. Bits are those of whole packets, headers included.",
        ]
    )


def _cost(cost: Mapping[str, Any]) -> str:
    text = cost_text(cost)
    return f"{text[:1].upper()}{text[1:]}. {cost.get('basis', '')}".strip()


def _use(file: CodecFile, name: str) -> str:
    data = [facts["data"] for facts in file.card.get("recordings", [])]
    tree: dict[str, Any] = {"uplink": {"name": file.name, "state": name}}
    if data and all(facts == data[0] and facts["part"] == "d1" for facts in data):
        # another seed would draw another D1, and d2 would hold rows the codec comes from
        split = {"part": "d2", "d1_share": data[0]["d1_share"], "seed": data[0]["split_seed"]}
        tree = {"data": split, **tree}
    if _knows_directions_of_a(file):
        tree["training"] = {"subspace": "A"}
    return f"```toml\n{tomli_w.dumps(tree)}```"


def _knows_directions_of_a(file: CodecFile) -> bool:
    try:
        codec = file.codec()
    except CodecStateError:  # of a codec that is not known here
        return False
    if not isinstance(codec, LearnedCodec):
        return False
    known = codec.directions(file.state, file.spec)
    return any(factor.kind == "A" and factor.name in known for factor in file.spec)


def _span(rounds: Sequence[int]) -> str:
    if not rounds:
        return "-"
    return str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"
