"""One client's training in one round: from the global adapter to a change of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.config import TrainingConfig
from cgfedllm.data.batching import RowOrder, micro_batches, steps_of_round, steps_per_round
from cgfedllm.data.encoding import Example
from cgfedllm.errors import DataError, TrainingError
from cgfedllm.model import AdaptedModel
from cgfedllm.seeding import derive_seed
from cgfedllm.training.attention import packed_attention, supports_packing
from cgfedllm.training.loss import summed_loss
from cgfedllm.training.optim import (
    OptimizerState,
    learning_rate,
    make_optimizer,
    restore_state,
    save_state,
)
from cgfedllm.training.subspace import SubspaceOptimizer


@dataclass(frozen=True)
class TrainResult:
    """What came of one round of local training.

    Parameters
    ----------
    adapter : AdapterUpdate
        Values after training.
    loss : float
        Mean over the round's label tokens, nats.
    steps, tokens : int
        Optimiser steps taken; tokens that went through the model.
    seconds : float
        Wall time.
    optimizer_state : dict of ndarray or None
        Moments for the next round, under `training.keep_optimizer`.
    """

    adapter: AdapterUpdate
    loss: float
    steps: int
    tokens: int
    seconds: float
    optimizer_state: OptimizerState | None


class LocalTrainer:
    """Trains the adapter of one model on one client's rows after another's.

    Parameters
    ----------
    model : AdaptedModel
        Shared; its adapter values are overwritten.
    config : TrainingConfig
        What to do.
    seed : int
        Names row order and dropout.
    rounds : int
        Length of the run, for the learning-rate schedule.
    max_length : int
        Longest row, to see whether rows can be packed.
    """

    def __init__(
        self,
        model: AdaptedModel,
        config: TrainingConfig,
        *,
        seed: int,
        rounds: int,
        max_length: int,
    ) -> None:
        self._model = model
        self._config = config
        self._seed = seed
        self._rounds = rounds
        self._packed = use_packing(model, config, max_length)

    def train(
        self,
        start: AdapterUpdate,
        examples: Sequence[Example],
        *,
        client: str,
        round: int,
        proximal_mu: float = 0.0,
        optimizer_state: OptimizerState | None = None,
        directions: Mapping[str, Float32Array] | None = None,
    ) -> TrainResult:
        """Train for one round.

        Parameters
        ----------
        start : AdapterUpdate
            The global adapter, values on the model's spec.
        examples : sequence of Example
            The client's training rows.
        client : str
            Its name.
        round : int
            From 1.
        proximal_mu : float
            FedProx: adds mu/2 * ||w - start||^2 to the loss (Li et al., arXiv 1812.06127).
        optimizer_state : dict of ndarray, optional
            Moments from this client's last round.
        directions : mapping, optional
            Train along these only (see `training.subspace`).

        Raises
        ------
        DataError
            If there are no rows.
        TrainingError
            If the loss or the trained adapter is not finite.
        """
        if not examples:
            raise DataError(f"client {client!r} has no rows to train on")
        config, model = self._config, self._model
        began = time.perf_counter()
        model.set_adapter(start)
        parameters = model.trainable_parameters()
        anchors = [p.detach().clone() for p in parameters] if proximal_mu else None
        optimizer: torch.optim.Optimizer | SubspaceOptimizer
        if directions:
            optimizer = SubspaceOptimizer(config, model.spec, parameters, directions)
        else:
            optimizer = make_optimizer(config, parameters)
        optimizer.zero_grad(set_to_none=True)  # a client that failed may have left its gradient
        if optimizer_state is not None and isinstance(optimizer, torch.optim.Optimizer):
            restore_state(optimizer, model.spec, config.optimizer, optimizer_state)

        amount = {
            "batch_size": config.batch_size,
            "local_steps": config.local_steps,
            "local_epochs": config.local_epochs,
        }
        total = steps_per_round(len(examples), **amount)  # type: ignore[arg-type]
        events.publish(events.ClientStarted(client, round, total))
        order = RowOrder(len(examples), self._seed, client)
        loss_sum, label_tokens, tokens = 0.0, 0, 0
        # dropout must not depend on which clients ran before in this process
        with torch.random.fork_rng(devices=_cuda_devices(model)), self._training():
            torch.manual_seed(derive_seed(self._seed, "dropout", client, round))
            steps = steps_of_round(order, len(examples), round, **amount)  # type: ignore[arg-type]
            for step, picked in enumerate(steps, start=1):
                step_began = time.perf_counter()
                # the middle of the step: neither warm-up's first nor decay's last step is wasted
                progress = round - 1 + (step - 0.5) / total
                rate = learning_rate(config, progress, self._rounds)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                rows = [examples[i] for i in picked]
                loss, n_labels, n_tokens = self._backward(rows)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"client {client!r}, round {round}, step {step}: the loss is {loss}; "
                        "lower training.lr, set training.max_grad_norm, or use warmup_rounds"
                    )
                if anchors is not None:
                    for parameter, anchor in zip(parameters, anchors, strict=True):
                        assert parameter.grad is not None
                        parameter.grad.add_(parameter.detach() - anchor, alpha=proximal_mu)
                if config.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss_sum += loss
                label_tokens += n_labels
                tokens += n_tokens
                events.publish(
                    events.StepFinished(
                        client, step, loss / n_labels, n_tokens, time.perf_counter() - step_began
                    )
                )
        trained = model.get_adapter()
        if not trained.is_finite():
            raise TrainingError(
                f"client {client!r}, round {round}: the trained adapter holds NaN or infinity; "
                "lower training.lr or use warmup_rounds"
            )
        return TrainResult(
            adapter=trained,
            loss=loss_sum / label_tokens,
            steps=total,
            tokens=tokens,
            seconds=time.perf_counter() - began,
            optimizer_state=(
                save_state(optimizer, model.spec, config.optimizer)
                if config.keep_optimizer and isinstance(optimizer, torch.optim.Optimizer)
                else None
            ),
        )

    def _backward(self, rows: Sequence[Example]) -> tuple[float, int, int]:
        """Accumulate the gradient of the mean loss per label token over one step's rows."""
        size = self._config.micro_batch_size or self._config.batch_size
        pad = self._model.tokenizer.pad_token_id or 0
        batches = micro_batches(rows, size, packed=self._packed, pad_token=int(pad))
        n_labels = sum(batch.label_tokens for batch in batches)
        loss_sum = 0.0
        for batch in batches:
            loss = summed_loss(self._model.model, batch.to(self._model.device))
            (loss / n_labels).backward()
            loss_sum += loss.item()
        return loss_sum, n_labels, sum(batch.tokens for batch in batches)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Train mode and packed attention; both are undone after an error too."""
        model = self._model.model
        with packed_attention(model) if self._packed else nullcontext():
            model.train()
            try:
                yield
            finally:
                model.eval()


def use_packing(model: AdaptedModel, config: TrainingConfig, max_length: int) -> bool:
    """Resolve `training.batching`.

    Raises
    ------
    TrainingError
        If packing is demanded of a model that cannot be packed.
    """
    if config.batching == "padded":
        return False
    able = supports_packing(model.model, max_length)
    if config.batching == "packed" and not able:
        raise TrainingError(
            "training.batching = 'packed': this model's attention cannot be packed; "
            "use 'auto' or 'padded'"
        )
    return able


def _cuda_devices(model: AdaptedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
