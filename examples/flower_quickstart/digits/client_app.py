"""The client: plain Flower, and one mod."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from cgfedllm.flower import compression
from digits import task


def compress(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Compression as the run's configuration says.

    An app that always uses the same codec needs no such function: mods=[compression("...")].
    """
    codec = str(context.run_config["codec"])
    if not codec:
        return call_next(message, context)
    return compression(codec)(message, context, call_next)


app = ClientApp(mods=[compress])


@app.train()
def train(message: Message, context: Context) -> Message:
    model = task.Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = _rows(context)
    loss = task.train(
        model,
        rows,
        epochs=int(context.run_config["local-epochs"]),
        lr=float(message.content["config"]["lr"]),
        seed=int(context.run_config["seed"]) + int(message.content["config"]["server-round"]),
    )
    metrics = MetricRecord({"num-examples": len(rows[1]), "train-loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = task.Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = _rows(context)
    loss, accuracy = task.test(model, rows)
    metrics = MetricRecord({"num-examples": len(rows[1]), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _rows(context: Context) -> task.Rows:
    config = context.node_config
    return task.partition(int(config["partition-id"]), int(config["num-partitions"]))
