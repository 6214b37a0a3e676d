"""What a process needs to work on a run: model, data, codecs. Made once, shared by all clients.

In-process, server and clients share one workspace and thus one base model. On a remote node each
process has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecState, make_codec
from cgfedllm.config import NODE_DATA, Config, config_from_toml
from cgfedllm.data import ClientData, FederatedData, load_federated_data, load_own_data
from cgfedllm.data.encoding import EncodedRows, Example, RowEncoder
from cgfedllm.errors import DataError, PrivacyError
from cgfedllm.lora import initial_adapter

if TYPE_CHECKING:
    from cgfedllm.base_weights import BaseWeights
    from cgfedllm.model import AdaptedModel
    from cgfedllm.privacy.plan import PrivacyPlan
    from cgfedllm.tgap.codec_file import CodecFile
    from cgfedllm.training.local import LocalTrainer


@dataclass(frozen=True)
class OwnData:
    """The rows that a node brings itself.

    Parameters
    ----------
    source : str
        File, glob, folder or hub id on that node.
    name : str
        The client's name in the federation.
    """

    source: str
    name: str


class Workspace:
    """Model, data and codecs of one configuration, each made when first asked for.

    Parameters
    ----------
    config : Config
        Resolved configuration.
    run_dir : Path
        Run folder; simulated clients keep their memory below it.
    own : OwnData, optional
        Where this process is a node that brings its own rows: it is then the one client here.
    """

    def __init__(self, config: Config, run_dir: Path, own: OwnData | None = None) -> None:
        self.config = config
        self.run_dir = run_dir
        self.own = own
        self._encoded: dict[tuple[str, str], EncodedRows] = {}

    @cached_property
    def model(self) -> AdaptedModel:
        """The adapted model; loading it takes seconds."""
        model = _shared_model(_model_key(self.config))
        # another seed's run in this process may have left its values in it
        model.set_adapter(initial_adapter(model.full_spec, self.config.seed))
        return model

    @cached_property
    def base_weights(self) -> BaseWeights:
        """By which this copy of the base model is told from another."""
        from cgfedllm.base_weights import base_weights

        return base_weights(self.model.model.get_base_model(), self.config.model.id)

    @cached_property
    def data(self) -> FederatedData:
        """Rows of every client that this process may see, and the global held-out set."""
        data, seed = self.config.data, self.config.seed
        if self.own is None:
            return load_federated_data(data, seed)
        return load_own_data(data, seed, self.own.source, self.own.name)

    @property
    def n_clients(self) -> int | None:
        """How many clients the federation has; None where nobody can tell.

        Raises
        ------
        DataError
            If `federation.clients` says otherwise than the data.
        """
        said = self.config.federation.clients
        if self.config.data.source == NODE_DATA:
            return said
        found = len(self.data.clients)
        if said not in (None, found):
            raise DataError(f"federation.clients is {said}, but the data has {found} clients")
        return found

    @property
    def spec(self) -> AdapterSpec:
        """What is trained and sent."""
        return self.model.spec

    @cached_property
    def start(self) -> AdapterUpdate:
        """Initial values of the trained adapter; the same on every machine."""
        whole = initial_adapter(self.model.full_spec, self.config.seed)
        views = whole.views()
        return AdapterUpdate.from_arrays(self.spec, {f.name: views[f.name] for f in self.spec})

    def whole(self, adapter: AdapterUpdate) -> AdapterUpdate:
        """The whole adapter for trained values: under `freeze_a`, with the A factors it needs."""
        values = initial_adapter(self.model.full_spec, self.config.seed)
        views = values.views()
        for name, view in adapter.views().items():
            views[name][...] = view
        return values

    @cached_property
    def codec_file(self) -> CodecFile | None:
        """The pre-trained uplink codec, if the configuration names one.

        Clients have it under `uplink.clients_hold_state` alone.

        Raises
        ------
        CodecStateError
            If the file is missing, damaged, or of another codec or adapter.
        """
        # only where a file is named does it take the model to know the spec
        return None if self.config.uplink.state is None else read_codec_file(self.config, self.spec)

    @cached_property
    def uplink(self) -> Codec:
        """Codec from client to server.

        Raises
        ------
        CodecStateError
            As `codec_file`.
        """
        return uplink_codec(self.config, self.codec_file)

    @cached_property
    def codec_state(self) -> CodecState:
        """State of the uplink codec before the first round; empty for codecs that do not learn.

        Raises
        ------
        CodecStateError
            As `codec_file`.
        """
        if self.codec_file is not None:
            return self.codec_file.state
        return self.uplink.initial_state(self.spec, self.config.seed)

    def save_codec(self, path: Path, state: CodecState, card: dict[str, Any]) -> None:
        """Write the uplink codec as a codec file.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        from cgfedllm.codecs.learning import LearnedCodec
        from cgfedllm.tgap.codec_file import save_codec_file

        assert isinstance(self.uplink, LearnedCodec)
        save_codec_file(path, self.uplink, state, self.spec, card)

    @cached_property
    def downlink(self) -> Codec:
        """Codec from server to client."""
        return make_codec(self.config.downlink.name, self.config.downlink.options)

    @cached_property
    def privacy(self) -> PrivacyPlan | None:
        """What the [privacy] table comes to; None without a mechanism.

        Raises
        ------
        PrivacyError
            If the run would spend more than its budget, or the clients cannot be counted.
        """
        if self.config.privacy.mechanism == "none":
            return None
        from cgfedllm.privacy.plan import plan_privacy

        clients = self.n_clients
        if clients is None:
            raise PrivacyError(
                "differential privacy depends on how many clients there are, which cannot be "
                "counted where each node brings rows of its own; set federation.clients"
            )
        return plan_privacy(self.config, clients)

    @cached_property
    def packed(self) -> bool:
        """Whether rows are packed for this model."""
        from cgfedllm.training.local import use_packing

        return use_packing(self.model, self.config.training, self.config.data.max_length)

    @cached_property
    def trainer(self) -> LocalTrainer:
        """Trains any client on the shared model."""
        from cgfedllm.training.local import LocalTrainer

        self.reset_frozen_factors()
        return LocalTrainer(
            self.model,
            self.config.training,
            seed=self.config.seed,
            rounds=self.config.federation.rounds,
            max_length=self.config.data.max_length,
        )

    def reset_frozen_factors(self) -> None:
        """Give the whole adapter its initial values: under `freeze_a`, A is never sent."""
        self.model.set_adapter(initial_adapter(self.model.full_spec, self.config.seed))

    def client(self, partition: int) -> ClientData:
        """Rows of one partition.

        Raises
        ------
        DataError
            If there is no such partition.
        """
        clients = self.data.clients
        if not 0 <= partition < len(clients):
            raise DataError(
                f"partition {partition} does not exist: the data has {len(clients)} clients"
            )
        return clients[partition]

    def examples(self, owner: ClientData | None, part: str) -> list[Example]:
        """Tokenised rows of a client ("train", "validation", "test") or the held-out set."""
        return self.encoded(owner, part).examples

    def encoded(self, owner: ClientData | None, part: str) -> EncodedRows:
        """As `examples`, with the counts of rows cut and dropped."""
        key = ("" if owner is None else owner.name, part)
        if key not in self._encoded:
            rows = self.data.heldout if owner is None else getattr(owner, part)
            encoder = RowEncoder(self.config.data, self.model.tokenizer, self.model.max_positions)
            self._encoded[key] = encoder.encode(rows)
        return self._encoded[key]


@lru_cache(maxsize=2)
def workspace_for(config_toml: str, run_dir: str, own: OwnData | None = None) -> Workspace:
    """The workspace of a resolved configuration; one a process."""
    return Workspace(config_from_toml(config_toml), Path(run_dir), own)


def read_codec_file(config: Config, spec: AdapterSpec) -> CodecFile | None:
    """The pre-trained uplink codec, if the configuration names one.

    Raises
    ------
    CodecStateError
        If the file is missing, damaged, or of another codec or adapter.
    """
    uplink = config.uplink
    if uplink.state is None:
        return None
    from cgfedllm.tgap.codec_file import load_codec_file

    file = load_codec_file(uplink.state)
    file.check(spec, codec=uplink.name, options=uplink.options)
    return file


def uplink_codec(config: Config, file: CodecFile | None) -> Codec:
    """Codec from client to server; a file's options hold unless `uplink.options` says otherwise."""
    uplink = config.uplink
    return make_codec(uplink.name, uplink.options) if file is None else file.codec(uplink.options)


def _model_key(config: Config) -> str:
    """Everything the loaded model depends on; runs that differ elsewhere share it."""
    reduced = Config(model=config.model, lora=config.lora)
    return reduced.to_toml()


@lru_cache(maxsize=1)
def _shared_model(key: str) -> AdaptedModel:
    from cgfedllm.model import load_adapted_model

    return load_adapted_model(config_from_toml(key))
