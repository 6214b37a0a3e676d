"""Codec files among the candidates, and which recorded updates they must not be measured on.

A card tells the fingerprints of the recordings its codec was fitted on and the rounds it was
trained on, but names no clients. So every update of such a round counts as seen, also those of
clients that were held out. Later rounds of the same recording, by which a fit only chose when to
stop, do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm.analysis.samples import Sample
from cgfedllm.analysis.sources import untaken
from cgfedllm.errors import CodecStateError

if TYPE_CHECKING:
    from cgfedllm.tgap.codec_file import CodecFile
    from cgfedllm.tgap.recording import Recording

_GENERIC = "codec"
"""Name of a codec file that says nothing: the folder it lies in is what people chose."""


@dataclass(frozen=True)
class Fitted:
    """A codec file and what tables call it.

    Parameters
    ----------
    name : str
        Of the file or of its folder, told apart by a number.
    file : CodecFile
        The codec, its state and its card.
    """

    name: str
    file: CodecFile

    def seen(self, recording: Recording) -> set[int]:
        """Rounds of a recording that the codec was fitted on.

        Raises
        ------
        CodecStateError
            If the card does not say what it was fitted on.
        """
        adapted = [run for run in self.file.card.get("federated", []) if run.get("adapt_every")]
        if adapted:
            raise CodecStateError(
                f"the codec file {self.name!r} learned on in a federated run "
                f"({adapted[-1].get('run')}), whose updates nobody kept a list of, so no "
                "measurement of it could be trusted; measure the file that the run began with"
            )
        try:
            sources = list(self.file.card["recordings"])
            trained = list(self.file.card["splits"]["train"]["rounds"])
            return {
                int(number)
                for facts, rounds in zip(sources, trained, strict=True)
                if _holds(recording, facts)
                for number in rounds
            }
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise CodecStateError(
                f"the codec file {self.name!r} does not say which updates it was fitted on "
                f"({error!r}), so no measurement of it could be trusted; pre-train again"
            ) from None

    def check_unseen(self, recording: Recording, samples: Sequence[Sample]) -> None:
        """Refuse to be measured on what it was fitted on.

        Raises
        ------
        CodecStateError
            If it was fitted on one of the samples' rounds, or does not say on what.
        """
        seen = self.seen(recording)
        known = [sample.round for sample in samples if sample.round in seen]
        if known:
            rounds = ", ".join(map(str, sorted(set(known))))
            raise CodecStateError(
                f"it was fitted on {len(known)} of the {len(samples)} updates that are measured "
                f"here (rounds {rounds}); measure it on another recording, or pre-train it on the "
                "earlier half of this one"
            )


def load_fitted(paths: Sequence[Path | str]) -> list[Fitted]:
    """Read codec files.

    Raises
    ------
    CodecStateError
        If one is missing, damaged or no codec file.
    """
    from cgfedllm.tgap.codec_file import load_codec_file

    found: dict[str, Fitted] = {}
    for path in map(Path, paths):
        base = path.resolve().parent.name if path.stem == _GENERIC else path.stem
        name = untaken(base, found)
        found[name] = Fitted(name, load_codec_file(path))
    return list(found.values())


def _holds(recording: Recording, facts: dict[str, Any]) -> bool:
    """Whether this is the recording a card tells of, which may have grown since."""
    count = int(facts["rounds"])
    rounds = recording.rounds()[:count]
    if len(rounds) < count:
        return False
    return recording.select(rounds=rounds).fingerprint == str(facts["fingerprint"])
