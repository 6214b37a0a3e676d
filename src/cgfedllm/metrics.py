"""What is written down about a run: one record a round, one row a client."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

Energy = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class ModuleRecord:
    """Energies (sums of squares) of one kind of factor, over all layers of one update."""

    signal: Energy
    """Of what the client gave its codec, error feedback included."""
    decoded: Energy
    """Of what the packet decodes to."""
    error: Energy
    """Of the difference; 0 where the packet is exact."""


@dataclass
class ClientRecord:
    """One client's part in one round."""

    client: str
    examples: int
    """Rows the client trained on (its weight in the average)."""
    steps: int
    tokens: int
    """Tokens that went through the model in training, padding excluded."""
    train_loss: float
    """Mean loss per label token over the round's steps, nats."""
    update_norm: float
    """Euclidean norm of the change the client wanted to send."""
    uplink_bytes: int
    downlink_bytes: int
    train_seconds: float
    encode_seconds: float
    decode_seconds: float
    """Server-side decoding of this client's packet plus client-side decoding of the broadcast."""
    codec_bytes: int = 0
    """Of the uplink codec's state, sent down; not part of `downlink_bytes`."""
    norm_ratio: float | None = None
    """Norm of the decoded update over the round's median; None: not screened."""
    cosine: float | None = None
    """Of the decoded update to the median of the others' directions; None: not screened."""
    suspicion: str = ""
    """What screening found odd about an update that was used all the same."""
    fidelity: dict[str, ModuleRecord] = field(default_factory=dict)
    """What the codec kept, by kind of factor (``q_proj.A``); empty where clients do not tell:
    under privacy and secure aggregation, in a flush, and in runs of earlier releases."""


@dataclass
class FailureRecord:
    """A reply that could not be used, and why."""

    client: str
    reason: str


@dataclass
class RoundRecord:
    """One line of metrics.jsonl. Round 0 is the state before any training."""

    round: int
    clients: list[ClientRecord] = field(default_factory=list)
    failures: list[FailureRecord] = field(default_factory=list)
    flush: bool = False
    """Whether clients sent what error feedback still held, and did not train."""
    attempts: int = 1
    """How often the round was tried; above 1 after too few usable replies."""
    uplink_bytes: int = 0
    """Length of all update packets received this round."""
    downlink_bytes: int = 0
    """Length of all adapter packets sent this round, evaluation broadcasts included."""
    uplink_bytes_total: int = 0
    downlink_bytes_total: int = 0
    uplink_bytes_fp32: int = 0
    """What the same replies would weigh as bare float32."""
    uplink_bytes_fp32_total: int = 0
    downlink_bytes_fp32: int = 0
    """What the same broadcasts would weigh as bare float32."""
    downlink_bytes_fp32_total: int = 0
    codec_bytes: int = 0
    """Length of what was sent down of the uplink codec's state; not part of `downlink_bytes`."""
    codec_bytes_total: int = 0
    secagg_uplink_bytes: int = 0
    """Keys and shares of secure aggregation that came in; not part of `uplink_bytes`, which has the
    masked packets."""
    secagg_uplink_bytes_total: int = 0
    secagg_downlink_bytes: int = 0
    """The same that went out; not part of `downlink_bytes`."""
    secagg_downlink_bytes_total: int = 0
    tgap_uplink_bytes: int = 0
    """What pre-training the uplink codec cost clients' uplinks, as its file says: in round 0, once.
    No total holds it."""
    tgap_downlink_bytes: int = 0
    """The same for their downlinks."""
    update_norm: float = 0.0
    """Norm of the change made to the global adapter."""
    epsilon: float | None = None
    """Spent so far of the privacy budget, where the run has one."""
    clip: float | None = None
    """Longest norm of an update in this round, under differential privacy."""
    product_gap: float | None = None
    """||mean(B A) - mean(B) mean(A)|| / ||mean(B A)||: what averaging the factors apart ignores."""
    heldout_nll: float | None = None
    """Negative log-likelihood per label token on the global held-out set, nats."""
    client_nll: dict[str, float] = field(default_factory=dict)
    """The same on each client's own validation rows."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time: train, encode, transfer, decode, aggregate, evaluate, checkpoint, total."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Any) -> RoundRecord:
        """Inverse of `to_dict`.

        Raises
        ------
        ValueError
            If a value is missing or of another type than it should be.
        """
        if not isinstance(row, dict) or not {"clients", "failures"} <= row.keys():
            raise ValueError("no clients or no failures are written down")
        return _RECORD.validate_python(row)


_RECORD = TypeAdapter(RoundRecord)
