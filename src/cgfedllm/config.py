"""One typed configuration tree: TOML in, resolved TOML out, ``--set a.b=c`` on top.

Every key has a default and a description; `cgfedllm run --dry-run` prints the resolved tree.
This module imports neither torch nor Flower, so a wrong key is reported in no time.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cgfedllm.errors import CodecError, ConfigError, PrivacyError

if TYPE_CHECKING:
    from cgfedllm.codecs.linear import LinearCodec

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]

EMBEDDED_MODEL = "embedded"
DEMO_DATA = "demo"
NODE_DATA = "node"
WITHOUT_FLUSH: dict[str, Any] = {"uplink.flush": "", "uplink.flush_options": {}}
"""Overrides for a run without the round after the last."""
MEAN_STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox")
"""Strategies that use nothing of their replies but the mean."""
_PATH_KEYS = ("data.source", "data.heldout_source", "model.id", "uplink.state")


class Section(BaseModel):
    """A table of the configuration: frozen, strict, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The base model that stays frozen."""

    id: str = EMBEDDED_MODEL
    """A hub id, a local folder, or "embedded" (SmolLM2-135M-Instruct, ships with the package)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is float32 on CPU and bfloat16 on GPU. Adapters are trained in float32 always."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the base through bitsandbytes (needs a GPU and the [gpu] extra)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Leave off unless you have read that code."""


class LoraConfig(Section):
    """The low-rank adapter (Hu et al., arXiv 2106.09685), made by PEFT."""

    rank: Positive = 8
    """Rank r of every factor pair."""
    alpha: PositiveFloat = 16.0
    """Scale: the weight change is alpha / rank * B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input during training."""
    target_modules: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names (suffixes) of the linear layers to adapt; ["all-linear"] takes every one."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Other ranks for modules whose name matches a pattern."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Other alphas for modules whose name matches a pattern."""
    freeze_a: bool = False
    """Train and send B only (FFA-LoRA, Sun et al., arXiv 2403.12313): half the bytes."""

    @model_validator(mode="after")
    def _targets_given(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules must name at least one module")
        return self


class SplitConfig(Section):
    """How each client's rows are divided, before anything else happens to them."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each client's rows kept for its own validation."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each client's rows kept for its own test."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of each client's rows pooled into the global held-out set."""
    max_validation_rows: NonNegative = 64
    """At most this many validation rows a client, the others go to training; 0: no limit."""
    max_heldout_rows: NonNegative = 512
    """At most this many held-out rows in all, the others go to training; 0: no limit."""

    @model_validator(mode="after")
    def _something_left(self) -> SplitConfig:
        if self.validation + self.test + self.heldout >= 1:
            raise ValueError("validation + test + heldout must leave rows for training")
        return self


class PartitionConfig(Section):
    """Which client gets which rows."""

    kind: Literal["natural", "iid", "dirichlet", "quantity", "files"] = "natural"
    """natural: one client a value of `column`. iid: equal random shares. dirichlet: label skew
    (Hsu et al., arXiv 1909.06335) over `column`. quantity: sizes drawn from Dirichlet(alpha).
    files: one client a file."""
    clients: Positive | None = None
    """Number of clients (iid, dirichlet, quantity); natural and files may only be limited."""
    column: str = "client"
    """The client column (natural) or the label column (dirichlet)."""
    alpha: PositiveFloat = 0.5
    """Concentration for dirichlet and quantity: smaller is more uneven."""
    min_rows: Positive = 8
    """Every client must end with at least this many rows."""

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> PartitionConfig:
        if self.kind in ("iid", "dirichlet", "quantity") and self.clients is None:
            raise ValueError(f"clients must be set when kind = {self.kind!r}")
        return self


class DataConfig(Section):
    """Where rows come from and how a row becomes text."""

    source: str = DEMO_DATA
    """"demo" (docstrings of installed libraries), a file or glob (JSONL, JSON, CSV, Parquet; .gz
    too), a local data set folder, a hub id, or "node": each SuperNode brings rows of its own, which
    nobody else reads. Relative paths are taken from the config file."""
    name: str | None = None
    """Configuration name of a hub data set or local data set folder."""
    split: str = "train"
    """Split of a hub data set or local data set folder."""
    heldout_source: str | None = None
    """A source of its own for the global held-out set, instead of a share of the clients' rows."""
    heldout_split: str = "test"
    """Split of heldout_source, where that is a hub data set or a local data set folder."""
    format: Literal["auto", "alpaca", "prompt_completion", "qa", "chat", "text"] = "auto"
    """Which fields a row has: alpaca (instruction, input, output), prompt_completion (prompt,
    completion), qa (question, answer), chat (messages), text (text). auto looks at the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps a field of the format to the column that holds it, e.g. {question = "query"}."""
    template: Literal["chat", "plain"] = "chat"
    """chat: through the tokenizer's chat template if it has one. plain: a fixed text layout."""
    system_prompt: str | None = None
    """System message put before every chat, where the template takes one."""
    train_on: Literal["answer", "all"] = "answer"
    """Which tokens carry the loss."""
    max_length: Positive = 512
    """Longest sequence in tokens; longer ones are cut, counted and reported."""
    max_rows: Positive | None = None
    """Use at most this many rows a client, drawn at random."""
    seed: NonNegative | None = None
    """Seed of the partition and the splits alone; None: the run's seed. Set it to train several
    seeds on one and the same split."""
    part: Literal["all", "d1", "d2"] = "all"
    """Which of a client's training rows are used: all; d1, on which codecs are pre-trained (TGAP);
    d2, the others. Rows kept for evaluation are the same in each."""
    d1_share: PositiveFraction = 0.3
    """Share of each client's training rows that makes up d1."""
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    """Which client gets which rows."""
    splits: SplitConfig = Field(default_factory=SplitConfig)
    """How each client's rows are divided."""


class TrainingConfig(Section):
    """What one client does in one round."""

    local_steps: Positive | None = None
    """Optimiser steps a round. Set this or local_epochs."""
    local_epochs: PositiveFloat | None = None
    """Passes over the client's rows a round. Set this or local_steps."""
    batch_size: Positive = 8
    """Rows in one optimiser step."""
    micro_batch_size: Positive | None = None
    """Rows in one forward pass; gradients are accumulated up to batch_size. None: batch_size."""
    batching: Literal["auto", "packed", "padded"] = "auto"
    """packed: rows laid end to end, no padding, attention kept within each row. padded: rows of
    like length padded to a rectangle. auto: packed wherever the model's attention allows it."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimiser."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: decoupled in adamw, part of the gradient in sgd."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    """AdamW's decay rates."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the whole run (all rounds)."""
    warmup_rounds: NonNegativeFloat = 0.0
    """Rounds (fractions allowed) of linear warm-up from zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient of each step to this norm; 0: off."""
    keep_optimizer: bool = False
    """Keep each client's optimiser state between rounds (default: fresh every round)."""
    subspace: Literal[False, "A", "AB"] = False
    """Train these factors (A, or both) only along the directions that the uplink codec's state
    knows (codec `learned`): what changes is then what it codes best. lr is scaled for each (see
    docs/learned-codec.md)."""

    @model_validator(mode="before")
    @classmethod
    def _default_amount(cls, values: Any) -> Any:
        if isinstance(values, dict) and not {"local_steps", "local_epochs"} & values.keys():
            return {**values, "local_steps": 4}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("set either local_steps or local_epochs, not both")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must divide "
                f"batch_size ({self.batch_size})"
            )
        for key in ("keep_optimizer", "weight_decay"):
            if self.subspace and getattr(self, key):
                raise ValueError(
                    f"subspace trains coefficients that begin at zero in every round, so {key} "
                    "means nothing there; leave it out, or set subspace = false"
                )
        return self


class StrategyConfig(Section):
    """Flower's aggregation strategy on the server."""

    name: Literal[
        "fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox", "median", "trimmed_mean", "krum"
    ] = "fedavg"
    """Which of Flower's strategies aggregates the decoded updates."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """fedavgm: server momentum."""
    lr: PositiveFloat = 0.01
    """fedadam, fedyogi: the server optimiser's own step size (eta)."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.99], min_length=2, max_length=2
    )
    """fedadam, fedyogi: decay rates."""
    tau: PositiveFloat = 1e-3
    """fedadam, fedyogi: degree of adaptivity."""
    proximal_mu: NonNegativeFloat = 0.01
    """fedprox: weight of the proximal term in every client's loss."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """trimmed_mean: share cut off at each end."""
    malicious: NonNegative = 1
    """krum: number of clients assumed to be malicious."""


class ScreeningConfig(Section):
    """What is noticed about single updates once they are decoded (docs/robustness.md)."""

    mode: Literal["off", "log", "reject"] = "log"
    """log: norms and cosines go into the metrics, and odd ones are reported. reject: odd ones are
    left out of the round. Nothing is screened under central differential privacy, which must not
    tell anything of single updates, nor where fewer than 4 replied."""
    max_norm_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """An update is odd if its norm is more than this many times the round's median norm."""
    min_cosine: Annotated[float, Field(ge=-1, le=1)] = -0.1
    """An update is odd if its cosine to the median of the others' directions is below this."""


class FederationConfig(Section):
    """Rounds, sampling, aggregation, and how the federation is run."""

    rounds: Positive = 10
    """Federated rounds."""
    fraction_train: PositiveFraction = 1.0
    """Share of the clients that train in a round."""
    clients: Positive | None = None
    """How many clients there are. None: as many as the data says, and where each node brings rows
    of its own, unknown. Over a network the first round waits a minute for the last of them."""
    min_clients: Positive = 1
    """Fewer usable replies than this and the round is retried, then the run stops."""
    round_retries: NonNegative = 2
    """How often a round with too few usable replies is tried again."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the average."""
    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    """Flower's aggregation strategy."""
    screening: ScreeningConfig = Field(default_factory=ScreeningConfig)
    """What is noticed about single updates."""
    max_update_norm: PositiveFloat | None = None
    """Updates with a larger Euclidean norm, as they were decoded, are left out; None: none is. A
    bound on what one client can do to the adapter in a round (docs/security.md)."""
    server_lr: PositiveFloat = 1.0
    """W_{t+1} = W_t + server_lr * (what the strategy proposes - W_t)."""
    aggregation: Literal["factors", "sum", "product"] = "factors"
    """factors: A and B are averaged apart. sum: decoded changes of A and B are summed, not averaged
    (as CG-FedLLM's Algorithm 1 is printed). product: the products B A are averaged exactly and
    factored back to rank r by SVD."""
    timeout: PositiveFloat = 3600.0
    """Seconds to wait for the replies of one round."""
    stateless: bool = False
    """Clients keep nothing between rounds, as where they come once or are many. The whole adapter
    goes down with every message; a lossy downlink codec and error feedback are without effect."""

    def sampled(self, clients: int) -> int:
        """How many of the clients train in a round: the fraction, at least `min_clients`."""
        return min(clients, max(int(clients * self.fraction_train), self.min_clients))

    @model_validator(mode="after")
    def _combinations(self) -> FederationConfig:
        if self.aggregation != "factors" and self.strategy.name != "fedavg":
            raise ValueError(
                f"aggregation = {self.aggregation!r} is a rule of its own and goes with "
                f"strategy.name 'fedavg', not {self.strategy.name!r}"
            )
        return self


class CodecConfig(Section):
    """One direction's codec."""

    name: str = "raw"
    """Name of a registered codec (`cgfedllm codecs` lists them)."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The codec's own options."""

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str) -> str:
        return _known_codec(name)

    @field_validator("options")
    @classmethod
    def _taken_by_the_codec(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        # without a name the name is refused already
        return _accepted(info.data["name"], options) if "name" in info.data else options


def _known_codec(name: str) -> str:
    """The name of a codec, if there is one of that name."""
    from cgfedllm.codecs import codec_class

    try:
        codec_class(name)
    except CodecError as error:
        raise ValueError(str(error)) from None
    return name


def learns(codec: str) -> bool:
    """Whether a codec of that name has a state that is learned."""
    from cgfedllm.codecs import codec_class
    from cgfedllm.codecs.learning import LearnedCodec

    return issubclass(codec_class(codec), LearnedCodec)


def _accepted(codec: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a codec, if it takes them."""
    from cgfedllm.codecs import make_codec

    try:
        make_codec(codec, options)
    except CodecError as error:
        raise ValueError(str(error)) from None
    return options


def linear_codec(uplink: CodecConfig) -> LinearCodec:
    """The uplink codec of a run with secure aggregation.

    Raises
    ------
    ValueError
        If sums of its packets do not decode.
    """
    from cgfedllm.codecs import make_codec
    from cgfedllm.codecs.linear import LinearCodec

    codec = make_codec(uplink.name, uplink.options)
    if not isinstance(codec, LinearCodec):
        raise ValueError(
            f"privacy.secagg adds packets up before they are decoded, and those of {uplink.name!r} "
            "do not add up; set uplink.name to one of those that can: 'sketch', or 'learned' with "
            "a codec file"
        )
    try:
        codec.reach  # noqa: B018  # raises where the step is not fixed
    except CodecError as error:
        raise ValueError(f"privacy.secagg: {error}") from None
    return codec


class UplinkConfig(CodecConfig):
    """From client to server."""

    error_feedback: bool = True
    """Keep what the codec lost and add it to the next update (Seide et al. 2014; Karimireddy
    et al., arXiv 1901.09847). No effect on lossless codecs, nor with federation.stateless."""
    error_feedback_decay: Fraction = 1.0
    """The residual is multiplied by this before it is added."""
    state: str | None = None
    """Codec file of a pre-trained codec (`cgfedllm pretrain` writes them). Its options hold unless
    uplink.options says otherwise. None: a learned codec starts from nothing."""
    clients_hold_state: bool = False
    """Clients have that file already, as they have the base model, so nothing of it is sent. A
    remote node is told where it is (`--node-config 'codec="/path/to/codec.safetensors"'`); one
    that holds no such file, or another, is sent the state all the same."""
    adapt_every: NonNegative = 0
    """A learned codec learns from what the server decoded after every so many rounds (FAF), and
    clients are sent what it learned; 0: it stays as it is."""
    flush: str = ""
    """Codec of one more round after the last, e.g. "int8", in which nobody trains and all connected
    clients send the residual they hold, times the decay; "": none. Weights are those of updates."""
    flush_options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The flush codec's own options."""

    @property
    def state_is_at_clients(self) -> bool:
        """Whether clients have the state before round 1: from the run's seed, or the file."""
        return self.state is None or self.clients_hold_state

    @field_validator("flush")
    @classmethod
    def _flush_registered(cls, name: str) -> str:
        if name and learns(_known_codec(name)):
            raise ValueError(
                f"{name!r} learns, and the flush comes after all learning; choose a codec that "
                "does not, e.g. 'int8'"
            )
        return name

    @field_validator("flush_options")
    @classmethod
    def _taken_by_the_flush_codec(
        cls, options: dict[str, Any], info: ValidationInfo
    ) -> dict[str, Any]:
        if info.data.get("flush"):
            return _accepted(info.data["flush"], options)
        if options and "flush" in info.data:
            raise ValueError("uplink.flush names no codec that these could be for")
        return options

    @model_validator(mode="after")
    def _only_what_learns_has_a_state(self) -> UplinkConfig:
        for key, given in (("state", self.state is not None), ("adapt_every", self.adapt_every)):
            if given and not learns(self.name):
                raise ValueError(
                    f"{key} is for codecs that learn, and {self.name!r} does not; remove "
                    f"uplink.{key}, or set uplink.name to one that does"
                )
        return self

    @model_validator(mode="after")
    def _what_clients_hold_is_named(self) -> UplinkConfig:
        if self.clients_hold_state and self.state is None:
            raise ValueError(
                "clients_hold_state says that clients have the file uplink.state, which names "
                "none; name it, or leave uplink.clients_hold_state out"
            )
        return self

    @model_validator(mode="after")
    def _what_is_learned_is_there(self) -> UplinkConfig:
        from cgfedllm.codecs import make_codec
        from cgfedllm.codecs.learning import LearnedCodec

        codec = make_codec(self.name, self.options)
        if isinstance(codec, LearnedCodec) and codec.needs_state and self.state is None:
            raise ValueError(
                f"name = {self.name!r} with scale_exponent sends nothing but coefficients of what "
                "it has learned, and it has learned nothing; name a codec file in uplink.state "
                "(`cgfedllm pretrain learned` writes one), or leave scale_exponent out"
            )
        return self


class TgapConfig(Section):
    """Pre-training of codecs on recorded updates (`cgfedllm pretrain`)."""

    collect: Literal["federated", "centralised", "local-only"] = "federated"
    """How updates are collected on D1 where no recording is given. federated: a warm-up run over
    `codec`. centralised: all rows on one machine, as one client. local-only: every client on its
    own rows from start to end."""
    rounds: Positive | None = None
    """Rounds of collecting; None: federation.rounds, and for a codec that learns from plain
    gradients (`learned`) at most 4 of them."""
    codec: str = "auto"
    """Uplink codec of federated collecting, with its default options. auto: int4 for a codec that
    learns from plain gradients, whose directions it hardly moves; raw for the others."""
    optimizer: Literal["auto", "run", "sgd"] = "auto"
    """Local optimiser while updates are collected. run: training.optimizer, as in the run. sgd:
    plain gradient descent at rate 1, gradients clipped to training.max_grad_norm or 1. auto: what
    the codec learns from best, which is sgd for `learned` and run for the others."""
    sampling: Literal["uniform", "rounds", "clients"] = "uniform"
    """What counts alike in a pass over the training updates. uniform: every update. rounds: every
    round, and within a round every client. clients: every client, and of a client every round."""
    stride: Positive = 1
    """Train on every n-th round only, counted from the first; 1: on each."""
    span: Positive = 1
    """A sample is the sum of one client's updates over so many rounds in a row. Above 1 only where
    a client goes on from its own adapter: centralised and local-only."""
    validation_rounds: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the rounds, the latest, that is kept for validation."""
    validation_clients: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the clients, drawn at random, that is kept for validation; 0: none."""
    epochs: Positive = 100
    """Most passes over the training updates."""
    patience: Positive = 20
    """Stop after so many passes in a row without a better fidelity on the validation updates."""
    seed: NonNegative | None = None
    """Seed of the fit and of the draw of clients; None: the run's seed."""

    @field_validator("codec")
    @classmethod
    def _codec_that_learns_nothing(cls, name: str) -> str:
        if name != "auto" and learns(_known_codec(name)):
            raise ValueError(f"{name!r} has to learn first; updates are collected to learn from")
        return name

    @model_validator(mode="after")
    def _codec_of_packets(self) -> TgapConfig:
        if self.codec not in ("auto", "raw") and self.collect != "federated":
            raise ValueError(
                f"codec {self.codec!r} is for collect = 'federated'; with {self.collect!r} no "
                "packets are sent"
            )
        return self


class EvaluationConfig(Section):
    """What is measured while the run goes on."""

    every: NonNegative = 1
    """Evaluate after every so many rounds (and at the start and the end); 0: start and end only."""
    heldout: bool = True
    """Evaluate on the global held-out set (the server does it)."""
    clients: bool = True
    """Also evaluate on every client's own validation rows (the clients do it, on their side)."""
    batch_size: Positive = 8
    """Rows in one forward pass."""

    def due(self, round: int, ends: Collection[int]) -> bool:
        """Whether a round is evaluated; `ends` are always."""
        return round in ends or (self.every > 0 and round % self.every == 0)


class SecureAggregationConfig(Section):
    """Masked sums: the server learns what clients' updates add up to, and none alone."""

    enabled: bool = False
    """Needs a codec whose packets add up (`sketch` with a fixed scale_exponent), uniform weights
    and a strategy that uses the mean alone."""
    threshold: Annotated[int, Field(ge=2)] | None = None
    """So many clients at least are in a sum, and must see each round through; more than half of
    those asked, and not below federation.min_clients. None: two thirds, rounded up."""


class AdaptiveClipConfig(Section):
    """privacy.clip follows a quantile of the updates' norms (Andrew et al., arXiv 1905.03871)."""

    enabled: bool = False
    """Only with privacy.mechanism = "central"; privacy.clip is where it starts."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the updates that should be no longer than the clipping norm."""
    rate: PositiveFloat = 0.2
    """The norm is multiplied by exp(-rate * (share within it - quantile)) after each round."""
    count_noise: PositiveFloat | None = None
    """Standard deviation of the noise on the number of updates within the norm, in clients. None: a
    20th of the expected clients, or the noise multiplier where that is more."""


class PrivacyConfig(Section):
    """Differential privacy of a client's part in the run, secure aggregation (docs/privacy.md)."""

    mechanism: Literal["none", "local", "central"] = "none"
    """local: each client clips its update and adds noise before coding, and trusts nobody. central:
    the server clips what it decodes and adds noise to the sum; clients trust the server."""
    clip: PositiveFloat = 1.0
    """Longest norm of a client's update, all factors together; a longer one is scaled down."""
    epsilon: float = 8.0
    """Budget of all rounds together, above 0."""
    delta: float | None = None
    """Between 0 and 1; None: 1 / clients^1.1."""
    noise_multiplier: PositiveFloat | None = None
    """Noise in units of the sensitivity. None: the least that keeps the budget over all rounds."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """How rounds are composed; prv is tighter and slower."""
    repeatable: bool = False
    """Draw noise from the run's seed, to repeat an experiment: hides nothing from who knows it."""
    adaptive_clip: AdaptiveClipConfig = Field(default_factory=AdaptiveClipConfig)
    """A clipping norm that follows the updates."""
    secagg: SecureAggregationConfig = Field(default_factory=SecureAggregationConfig)
    """Secure aggregation; goes with any mechanism or none."""

    @field_validator("epsilon")
    @classmethod
    def _a_budget(cls, epsilon: float) -> float:
        from cgfedllm.privacy.accountant import check_epsilon

        check_epsilon(epsilon)
        return epsilon

    @field_validator("delta")
    @classmethod
    def _a_probability(cls, delta: float | None) -> float | None:
        from cgfedllm.privacy.accountant import check_delta

        if delta is not None:
            check_delta(delta)
        return delta


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases (needs `pip install wandb`)."""
    mlflow: bool = False
    """Log to MLflow (needs `pip install mlflow`)."""


class Config(Section):
    """The whole experiment. Two runs with equal trees give equal results on one machine."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `output/name`."""
    output: str = "runs"
    """Folder that holds the run folders."""
    seed: NonNegative = 0
    """Seed of everything random."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(local_steps=4))
    federation: FederationConfig = Field(default_factory=FederationConfig)
    uplink: UplinkConfig = Field(default_factory=UplinkConfig)
    downlink: CodecConfig = Field(default_factory=CodecConfig)
    tgap: TgapConfig = Field(default_factory=TgapConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.lora.freeze_a and self.federation.aggregation == "product":
            raise ValueError(
                "lora.freeze_a makes the average of B exact already; "
                "use federation.aggregation = 'factors' with it"
            )
        if self.federation.stateless and self.training.keep_optimizer:
            raise ValueError(
                "federation.stateless clients keep nothing, so no optimiser state either; "
                "set training.keep_optimizer = false"
            )
        if learns(self.downlink.name):
            raise ValueError(
                f"downlink.name = {self.downlink.name!r} learns, which only uplink codecs may; "
                "choose a codec that does not, e.g. 'int8'"
            )
        if self.training.subspace and self.uplink.state is None:
            raise ValueError(
                "training.subspace trains along what the uplink codec has learned, and it has "
                "learned nothing; name a codec file in uplink.state (`cgfedllm pretrain learned` "
                "writes one), or set training.subspace = false"
            )
        if self.uplink.flush and not (self.keeps_residual and self.uplink.error_feedback_decay):
            raise ValueError(
                f"uplink.flush = {self.uplink.flush!r} sends what error feedback holds, and here "
                f"it holds nothing: {self._why_no_residual()}. Remove uplink.flush"
            )
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> Config:
        mechanism, federation = self.privacy.mechanism, self.federation
        if mechanism == "none":
            return self
        if self.keeps_residual:
            raise ValueError(
                f"privacy.mechanism = {mechanism!r} bounds what a client sends in a round, and "
                "error feedback adds what earlier rounds left; set uplink.error_feedback = false"
            )
        if mechanism == "central":
            wanted = {
                "federation.weighting": (federation.weighting, "uniform"),
                "federation.strategy.name": (federation.strategy.name, "fedavg"),
                "federation.aggregation": (federation.aggregation, "factors"),
                "uplink.adapt_every": (self.uplink.adapt_every, 0),
            }
            for key, (found, needed) in wanted.items():
                if found != needed:
                    raise ValueError(
                        "privacy.mechanism = 'central' releases one noised mean of equal weights "
                        f"and nothing else of the updates; set {key} = {needed!r}, not {found!r}"
                    )
            if federation.screening.mode == "reject":
                raise ValueError(
                    "federation.screening.mode = 'reject' leaves clients out by what they sent, "
                    "which the budget of privacy.mechanism = 'central' does not cover; set it to "
                    "'off'"
                )
        return self

    @model_validator(mode="after")
    def _adaptive_clip_is_central(self) -> Config:
        privacy = self.privacy
        if privacy.adaptive_clip.enabled and privacy.mechanism != "central":
            raise ValueError(
                "privacy.adaptive_clip needs a noised count of the updates within the norm, which "
                f"only mechanism = 'central' has, not {privacy.mechanism!r}; switch it off"
            )
        return self

    @model_validator(mode="after")
    def _sums_are_all_it_takes(self) -> Config:
        if not self.privacy.secagg.enabled:
            return self
        federation, central = self.federation, self.privacy.mechanism == "central"
        allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "federation.weighting": (federation.weighting, ("uniform",)),
            "federation.strategy.name": (federation.strategy.name, MEAN_STRATEGIES),
            "federation.aggregation": (federation.aggregation, ("factors", "sum")),
            "uplink.adapt_every": (self.uplink.adapt_every, (0,)),
            "uplink.flush": (self.uplink.flush, ("",)),
        }
        if central:
            # a draw of too few clients could not be opened, and may not be made again
            allowed["federation.fraction_train"] = (federation.fraction_train, (1.0,))
            allowed["privacy.adaptive_clip.enabled"] = (
                self.privacy.adaptive_clip.enabled,
                (False,),
            )
        for key, (found, good) in allowed.items():
            if found not in good:
                raise ValueError(
                    "privacy.secagg lets the server see one sum of updates of equal weight and "
                    f"nothing else; set {key} = {' or '.join(map(repr, good))}, not {found!r}"
                )
        linear_codec(self.uplink)
        return self

    @property
    def keeps_residual(self) -> bool:
        """Whether clients keep what the uplink codec lost, and the codec loses anything."""
        from cgfedllm.codecs import codec_class

        lossless = codec_class(self.uplink.name).lossless
        return self.uplink.error_feedback and not lossless and not self.federation.stateless

    @property
    def last_round(self) -> int:
        """The last round there is a record of: a flush is one more."""
        return self.federation.rounds + bool(self.uplink.flush)

    def _why_no_residual(self) -> str:
        if self.federation.stateless:
            return "federation.stateless clients keep nothing"
        if not self.uplink.error_feedback:
            return "uplink.error_feedback is off"
        if not self.uplink.error_feedback_decay:
            return "uplink.error_feedback_decay is 0"
        return f"the uplink codec {self.uplink.name!r} loses nothing"

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.output) / self.name

    def to_toml(self) -> str:
        """The resolved tree as TOML; `load_config` reads it back to an equal tree."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """A copy with dotted keys replaced, validated again.

        Raises
        ------
        ConfigError
            As `load_config`.
        """
        tree = self.model_dump(exclude_none=True)
        for key, value in overrides.items():
            _set(tree, key, value)
        return parse_config(tree)


def other_uplink(codec: str) -> dict[str, Any]:
    """Overrides for another uplink codec with its default options.

    What the other one learned stays behind, and a flush goes where the codec loses nothing that
    could be flushed.
    """
    from cgfedllm.codecs import codec_class, codec_names

    changes: dict[str, Any] = {
        "uplink.name": codec,
        "uplink.options": {},
        "uplink.state": None,
        "uplink.clients_hold_state": False,
        "uplink.adapt_every": 0,
        "training.subspace": False,
    }
    lossless = codec in codec_names() and codec_class(codec).lossless
    return changes | (WITHOUT_FLUSH if lossless else {})


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or start from the defaults) and apply ``key=value`` overrides.

    Parameters
    ----------
    path : path-like, optional
        TOML file. Paths inside it are relative to its folder.
    overrides : iterable of str
        ``a.b=c``; the value is read as TOML, or as a plain string where that fails. Paths are
        relative to the working folder.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, a key is unknown, a value has the wrong type, or
        values contradict each other. The message gives the key's full name.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config file {path} is not valid TOML: {error}") from None
        for key in _PATH_KEYS:
            _resolve_path(tree, key, path.parent)
    for item in overrides:
        key, separator, text = item.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(f"--set wants key=value, got {item!r}")
        _set(tree, key, parse_value(text.strip()))
        if key in _PATH_KEYS:
            _resolve_path(tree, key, Path.cwd())
    return parse_config(tree)


@lru_cache(maxsize=8)
def config_from_toml(text: str) -> Config:
    """Inverse of `Config.to_toml`; equal texts are read once, and share the (frozen) result.

    Raises
    ------
    ConfigError
        As `load_config`.
    """
    return parse_config(tomllib.loads(text))


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping.

    Raises
    ------
    ConfigError
        As `load_config`.
    PrivacyError
        If [privacy] asks for a budget that is none.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        causes = [item.get("ctx", {}).get("error") for item in error.errors()]
        # a budget that is none has a name of its own, here as elsewhere
        spent = any(isinstance(cause, PrivacyError) for cause in causes)
        raise (PrivacyError if spent else ConfigError)(_explain(error)) from None


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key with its description."""
    keys: dict[str, str] = {}
    for name, info in section.model_fields.items():
        full = f"{prefix}{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.update(known_keys(info.annotation, f"{full}."))
        else:
            keys[full] = " ".join((info.description or "").split())
    return keys


def _resolve_path(tree: dict[str, Any], dotted: str, folder: Path) -> None:
    """Make a path absolute if it says it is one or is there, so that the tree works anywhere."""
    section, key = dotted.split(".")
    table = tree.get(section)
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, str) or value in (EMBEDDED_MODEL, DEMO_DATA, NODE_DATA):
        return
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # ~name of somebody unknown here
        raise ConfigError(f"{dotted}: {value!r}: {error}") from None
    if value.startswith((".", "~")) or _is_there(folder, path):
        tree[section][key] = os.path.abspath(folder / path)  # noqa: PTH100  # keeps symlinks


def _is_there(folder: Path, path: Path) -> bool:
    try:
        if (folder / path).exists():
            return True
        return not path.is_absolute() and "*" in str(path) and any(folder.glob(str(path)))
    except (OSError, ValueError):  # too long, holds a NUL, a pattern glob does not take
        return False


def parse_value(text: str) -> Any:
    """A value as people type it: TOML, or a plain string where it is none."""
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tree["value"] if len(tree) == 1 else text  # a line break in it started another key


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{dotted}: {part!r} is a value, not a table")
    # one amount of local training replaces the other; setting one is not a contradiction
    if parents == ["training"] and leaf in ("local_steps", "local_epochs"):
        node.pop("local_epochs" if leaf == "local_steps" else "local_steps", None)
    node[leaf] = value


def _explain(error: ValidationError) -> str:
    lines = []
    known = known_keys()
    tables = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key; {_nearest(key, [*known, *sorted(tables)])}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = item.get("input")
            shown = "" if isinstance(got, dict) or got is None else f" (got {got!r})"
            lines.append(f"{key or 'config'}: {message}{shown}")
    return "invalid configuration:\n  " + "\n  ".join(lines)


def _nearest(key: str, candidates: list[str]) -> str:
    """Point at the key that was probably meant: the same name further down, or a like spelling."""
    table, dot, leaf = key.rpartition(".")
    below = [c for c in candidates if c.startswith(table + dot) and c.rpartition(".")[2] == leaf]
    siblings = [c for c in candidates if c.rpartition(".")[0] == table]
    near = below or get_close_matches(key, siblings, n=1)
    if not near:
        return f"keys there: {', '.join(siblings)}"
    return f"did you mean {' or '.join(map(repr, near))}?"
