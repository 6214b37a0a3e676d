"""The server: plain Flower, and one wrapper."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from cgfedllm.flower import CompressedStrategy
from digits import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    result = federate(grid, context)
    last = max(result.evaluate_metrics_serverapp)
    print(f"held-out accuracy: {result.evaluate_metrics_serverapp[last]['accuracy']:.3f}")
    sent = [m.get("cgfedllm-uplink-bytes") for m in result.train_metrics_clientapp.values()]
    if all(sent):
        print(f"sent by all clients: {sum(sent):,} bytes")


def federate(grid: Grid, context: Context) -> Result:
    """Train for the rounds that the configuration asks for."""
    strategy: Strategy = FedAvg(fraction_evaluate=0.0)
    codec = str(context.run_config["codec"])
    if codec:
        strategy = CompressedStrategy(strategy, codec)
    torch.manual_seed(int(context.run_config["seed"]))
    return strategy.start(
        grid,
        ArrayRecord(task.Net().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"lr": float(context.run_config["lr"])}),
        evaluate_fn=evaluate,
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss and accuracy on the rows that nobody trains on."""
    model = task.Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = task.test(model, task.held_out())
    return MetricRecord({"loss": loss, "accuracy": accuracy})
