"""A small Flower app that knows nothing of codecs, and what it takes to run it in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.flower import CompressedStrategy, compression

Arrays = dict[str, NDArray[Any]]
Train = Callable[[Arrays, int, int], Arrays]

NODES = (2, 3, 4, 5)
MINIMA: dict[str, Any] = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


def model() -> Arrays:
    """A matrix, a kernel, a bias and a counter, as a small network has them."""
    rng = np.random.default_rng(0)
    return {
        "dense.weight": rng.standard_normal((24, 40)).astype(np.float32),
        "conv.weight": rng.standard_normal((8, 6, 3, 3)).astype(np.float32),
        "dense.bias": rng.standard_normal(24).astype(np.float32),
        "norm.num_batches_tracked": np.array(0, np.int64),
    }


def stepped(arrays: Arrays, node: int, round_: int) -> Arrays:
    """What a client makes of arrays, the same however often it is asked."""
    rng = np.random.default_rng([node, round_])
    return {
        name: array + rng.standard_normal(array.shape).astype(np.float32) * np.float32(0.1)
        if array.dtype.kind == "f" and array.ndim
        else np.array(array + round_).astype(array.dtype)
        for name, array in arrays.items()
    }


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def arrays_in(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def plain_app(train: Train = stepped, mods: list[Any] | None = None) -> ClientApp:
    """A client without compression of its own; `mods` as given."""
    app = ClientApp(mods=mods)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        round_ = int(message.content["config"]["server-round"])
        trained = train(arrays_in(message.content["arrays"]), context.node_id, round_)
        metrics = MetricRecord({"num-examples": 10 * context.node_id, "loss": 1.0 / round_})
        content = RecordDict({"arrays": record_of(trained), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        seen = arrays_in(message.content["arrays"])
        total = float(sum(np.abs(array).sum(dtype=np.float64) for array in seen.values()))
        metrics = MetricRecord({"num-examples": 1, "total": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def app_of(codec: str, train: Train = stepped, **options: Any) -> ClientApp:
    """The same client with the mod."""
    return plain_app(train, [compression(codec, **options)])


def grid_of(
    app: ClientApp, nodes: Iterable[int] = NODES, partitions: Mapping[int, int] | None = None
) -> InProcessGrid:
    contexts = {
        node: Context(
            run_id=1,
            node_id=node,
            node_config={} if partitions is None else {"partition-id": partitions[node]},
            state=RecordDict(),
            run_config={},
        )
        for node in nodes
    }
    return InProcessGrid(app, contexts)


def fedavg(**options: Any) -> FedAvg:
    return FedAvg(**{**MINIMA, **options})


class Listening(FedAvg):
    """Keeps the replies it is given and makes nothing of them."""

    def __init__(self) -> None:
        super().__init__(**MINIMA)
        self.replies: list[Message] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.replies = list(replies)
        return None, None


def wrapped(codec: str = "raw", inner: Strategy | None = None) -> CompressedStrategy:
    return CompressedStrategy(inner or fedavg(), codec)
