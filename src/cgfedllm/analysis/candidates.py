"""What a comparison compares: codecs with options, variants of the configuration, references.

::

    --codec ecsq:bpp=0.05              another uplink codec
    --variant rank2:lora.rank=2        other settings, under a label of its own
    --reference centralised            no federation at all

Each is a set of changes to one base configuration. Model, data and evaluation are not among
what may change: two curves on different held-out rows cannot be compared.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from cgfedllm.config import WITHOUT_FLUSH, Config, other_uplink
from cgfedllm.errors import ConfigError
from cgfedllm.pairs import read_codec, read_pairs

REFERENCES = ("centralised", "local-only")
VARIABLE_TABLES = ("lora", "training", "federation", "uplink", "downlink", "privacy")
_LONGEST_SLUG = 80


@dataclass(frozen=True)
class Candidate:
    """One line of the comparison.

    Parameters
    ----------
    label : str
        As tables and figures show it.
    kind : str
        "codec", "variant", or "reference" (its label is the kind of reference).
    changes : mapping
        Dotted keys of the configuration and their values.
    """

    label: str
    kind: Literal["codec", "variant", "reference"]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return slug_of(self.label)

    def config(self, base: Config, **extra: Any) -> Config:
        """The candidate's configuration; `extra` are settings by dotted key, on top.

        The split is the base configuration's whatever the seed of the run, so that every seed
        is judged on the same held-out rows, and no trial trains on them.
        """
        split = base.seed if base.data.seed is None else base.data.seed
        # copied: an extra key may go into a table that is one of the changes
        changes = deepcopy(dict(self.changes))
        return base.with_overrides({"data.seed": split, **changes, **extra})

    def cell(self, base: Config, seed: int, settings: Mapping[str, Any]) -> Config:
        """Configuration of the run with one seed, under the name of its folder."""
        if self.kind == "reference":
            name = f"{base.name}-seed{seed}-{self.slug}"
        else:
            name = f"{base.name}-{self.slug}-seed{seed}"
        return self.config(base, **{**settings, "seed": seed, "name": name})


def candidates_of(
    base: Config,
    codecs: Sequence[str],
    variants: Sequence[str] = (),
    references: Sequence[str] = (),
) -> list[Candidate]:
    """Read and check all candidates, in order: codecs, variants, references.

    Parameters
    ----------
    base : Config
        What they change.
    codecs : sequence of str
        ``NAME`` or ``NAME:key=value,key=value``; a bare name that is the configuration's own
        uplink codec keeps the options it has there.
    variants : sequence of str
        ``LABEL:config.key=value,config.key=value``.
    references : sequence of str
        "centralised", "local-only".

    Raises
    ------
    ConfigError
        If one cannot be read, a codec or the configuration refuses a value, or two of them
        would share a run folder.
    """
    found: dict[str, Candidate] = {}
    for candidate in (
        *(parse_codec(text, base) for text in codecs),
        *(parse_variant(text, base) for text in variants),
        *(_reference(text) for text in references),
    ):
        other = found.setdefault(candidate.slug, candidate)
        if other != candidate:
            raise ConfigError(
                f"{other.label!r} and {candidate.label!r} would share the run folders "
                f"'{base.name}-{candidate.slug}-...'; give one of them another label"
            )
        candidate.config(base)  # a wrong value is reported now, not after hours
    return list(found.values())


def parse_codec(text: str, base: Config) -> Candidate:
    """Read ``NAME[:key=value,...]``; values are TOML, or plain strings.

    Raises
    ------
    ConfigError
        If it has another form, or the codec does not exist or refuses an option.
    """
    name, options = read_codec(text, "--codec NAME:key=value,key=value")
    shown = ",".join(f"{k}={_shown(v)}" for k, v in options.items())
    label = f"{name}:{shown}" if options else name
    if not options and name == base.uplink.name:
        return Candidate(label, "codec")
    changes = other_uplink(name) | {"uplink.options": options}
    candidate = Candidate(label, "codec", changes)
    candidate.config(base)
    return candidate


def parse_variant(text: str, base: Config) -> Candidate:
    """Read ``LABEL:config.key=value,...``.

    A variant that names another uplink (or downlink) codec starts with that codec's defaults.

    Raises
    ------
    ConfigError
        If it has another form, changes what a comparison keeps fixed, or the configuration
        refuses a value.
    """
    label, colon, rest = text.partition(":")
    label = label.strip()
    shape = "--variant LABEL:config.key=value,config.key=value"
    if not colon or not label:
        raise ConfigError(f"a variant is given as {shape}; got {text!r}")
    changes: dict[str, Any] = {}
    pairs = read_pairs(rest, text, shape)
    if pairs.get("uplink.name", base.uplink.name) != base.uplink.name:
        changes |= other_uplink(str(pairs["uplink.name"]))
    if pairs.get("downlink.name", base.downlink.name) != base.downlink.name:
        changes["downlink.options"] = {}
    for key, value in pairs.items():
        check_variable(key, f"variant {label!r}")
        changes[key] = value
    try:
        candidate = Candidate(label, "variant", changes)
        candidate.config(base)
    except ConfigError as error:
        raise ConfigError(f"variant {label!r}: {error}") from None
    return candidate


def check_variable(key: str, who: str) -> None:
    """Refuse keys that a comparison keeps fixed.

    Raises
    ------
    ConfigError
        If the key is not in one of the tables that may differ.
    """
    if key.partition(".")[0] not in VARIABLE_TABLES:
        raise ConfigError(
            f"{who} sets {key!r}, which a comparison keeps the same for all; it may differ in "
            f"{', '.join(VARIABLE_TABLES)}"
        )


def slug_of(label: str) -> str:
    """Part of a folder's name: ``ecsq:bpp=0.05`` becomes ``ecsq-bpp0.05``.

    A long one is cut, and told apart by a checksum.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", label.replace("=", "")).strip("-")
    if len(slug) > _LONGEST_SLUG:
        slug = f"{slug[: _LONGEST_SLUG - 9]}-{zlib.crc32(label.encode()):08x}"
    return slug


def _reference(kind: str) -> Candidate:
    if kind not in REFERENCES:
        raise ConfigError(f"reference is one of {', '.join(REFERENCES)}; got {kind!r}")
    return Candidate(kind, "reference", WITHOUT_FLUSH)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
