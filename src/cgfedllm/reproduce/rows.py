"""The rows of the table: who trains how, through which codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cgfedllm.config import Config

Kind = Literal["base", "centralised", "federated"]

AUTO_ENCODERS = {"cg_cnn": "1-D CNN", "cg_resnet": "ResNet", "cg_unet": "U-Net"}
PRESETS = ("printed", "fair")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    key : str
        Part of the names of its folders.
    label : str
        As the table shows it.
    kind : str
        "base": no training. "centralised": on pooled rows. "federated": through a codec.
    codec, preset : str
        The auto-encoder and its preset; empty where updates are sent as they are.
    changes : mapping
        Further settings, by dotted key.
    benchmarks : bool
        Whether it also answers the benchmarks' questions; rows that only vary another one do not.
    """

    key: str
    label: str
    kind: Kind = "federated"
    codec: str = ""
    preset: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    benchmarks: bool = True

    @property
    def pretrained(self) -> str:
        """Which codec file it needs; rows may share one."""
        return f"{self.codec}-{self.preset}" if self.codec else ""

    @property
    def candidate(self) -> str:
        """The codec as `cgfedllm pretrain` is told it."""
        return f"{self.codec}:preset={self.preset}"

    def config(self, base: Config, codec_file: str = "") -> Config:
        """Its experiment, on D2: D1 is for codecs alone, whether the row has one or not."""
        changes: dict[str, Any] = {"name": f"{base.name}-{self.key}", "data.part": "d2"}
        if self.codec:
            changes |= {
                "uplink.name": self.codec,
                "uplink.options": {"preset": self.preset},
                "uplink.state": codec_file,
                # the paper has none; what is not sent is lost
                "uplink.error_feedback": self.preset == "fair",
            }
        return base.with_overrides({**changes, **self.changes})


def _cg(codec: str, preset: str) -> Row:
    label = f"CG-FedLLM, {AUTO_ENCODERS[codec]}, {preset}"
    return Row(f"{codec}-{preset}", label, codec=codec, preset=preset)


ROWS = (
    Row("base", "Base", kind="base"),
    Row("centralised", "Centralised", kind="centralised"),
    Row("fedavg", "FedAvg-LoRA"),
    *(_cg(codec, preset) for preset in PRESETS for codec in AUTO_ENCODERS),
    Row(
        "cg_resnet-printed-sum",
        "ResNet, printed, sums in place of means",
        codec="cg_resnet",
        preset="printed",
        changes={"federation.aggregation": "sum"},
        benchmarks=False,
    ),
    Row(
        "cg_resnet-fair-plain",
        "ResNet, fair, no error feedback",
        codec="cg_resnet",
        preset="fair",
        changes={"uplink.error_feedback": False},
        benchmarks=False,
    ),
    Row(
        "cg_resnet-fair-adapting",
        "ResNet, fair, adapting every other round",
        codec="cg_resnet",
        preset="fair",
        changes={"uplink.adapt_every": 2},
        benchmarks=False,
    ),
)
"""The paper's table first, then what its text leaves open."""
