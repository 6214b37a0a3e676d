"""Local training against transformers' Trainer + PEFT, and against the arithmetic floor.

    python benchmarks/train_step.py

Both train the same adapter on the same rows with the same batch size, interleaved in one process;
tokens are real tokens, padding excluded. The Trainer runs with its default settings and pads each
batch to its longest row. The floor is the floating-point work of the step over the fp32 matrix
rate measured in the same run.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from common import spread, touch_memory, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    import torch

    from cgfedllm.config import load_config
    from cgfedllm.training.local import LocalTrainer
    from cgfedllm.workspace import Workspace

    config = load_config(
        None,
        [
            f"data.max_length={options.max_length}",
            f"training.batch_size={options.batch_size}",
            f"training.local_steps={options.steps}",
        ],
    )
    workspace = Workspace(config, Path("unused"))
    client = workspace.data.clients[0]
    examples = workspace.examples(client, "train")
    trainer = LocalTrainer(
        workspace.model,
        config.training,
        seed=0,
        rounds=10_000,
        max_length=options.max_length,
    )
    touch_memory()
    ours: list[float] = []
    theirs: list[float] = []
    floors: list[float] = []
    for repeat in range(options.repeats + 1):
        result = trainer.train(workspace.start, examples, client=client.name, round=repeat + 1)
        seconds, tokens = _hugging_face(workspace.model, examples, options, seed=repeat)
        floor = _floor_seconds(workspace, examples, options.steps * options.batch_size, repeat + 1)
        if repeat == 0:
            continue  # warm-up
        ours.append(result.tokens / result.seconds)
        theirs.append(tokens / seconds)
        floors.append(floor / result.seconds)
        print(f"ours {ours[-1]:.0f} tok/s, Trainer {theirs[-1]:.0f} tok/s, floor {floors[-1]:.0%}")
    del torch
    path = write_result(
        "train_step",
        {
            "what": "one client's local training, embedded model, demo rows",
            "settings": vars(options),
            "ours_tokens_per_second": spread(ours),
            "trainer_tokens_per_second": spread(theirs),
            "speedup": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
            "share_of_floor": spread(floors),
        },
    )
    print(path)


def _hugging_face(adapted: Any, examples: Any, options: Any, seed: int) -> tuple[float, int]:
    """Seconds and real tokens of the same amount of training with transformers' Trainer."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    seen: list[int] = []

    class Counting(DataCollatorForSeq2Seq):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            seen.append(sum(len(f["input_ids"]) for f in features))
            return super().__call__(features, return_tensors)

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter()

    rows = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        adapted.model.train()
        Trainer(
            model=adapted.model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch_size,
                max_steps=options.steps,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=Counting(adapted.tokenizer, padding=True),
            callbacks=[clock],
        ).train()
        adapted.model.eval()
    # the last batches may be prefetched and not trained on
    return clock.ended - clock.began, sum(seen[: options.steps])


def _floor_seconds(workspace: Any, examples: Any, count: int, round: int) -> float:
    """Time the step's floating-point work would take at the measured matrix rate.

    Frozen linear layers: one product forward, one backward (towards the input), 4 operations a
    weight and token. Adapter: 6. Head: 4, at label tokens only. Attention: its two products,
    causal half, forward and twice backward.
    """
    import torch

    from cgfedllm.data.batching import RowOrder

    picked = RowOrder(len(examples), 0, workspace.data.clients[0].name).take(
        (round - 1) * count, count
    )
    rows = [examples[i] for i in picked]
    base = workspace.model.model.get_base_model()
    head = base.get_output_embeddings().weight.numel()
    linear = sum(
        m.weight.numel()
        for name, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and ".lora_" not in name and "lm_head" not in name
    )
    adapter = workspace.model.spec.size
    layers, hidden = base.config.num_hidden_layers, base.config.hidden_size
    flops = 0.0
    for row in rows:
        tokens, labels = len(row.input_ids), int((row.labels != -100).sum())
        flops += tokens * (4 * linear + 6 * adapter) + labels * 4 * head
        flops += layers * 3 * 2 * (2 * tokens * tokens * hidden) / 2
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return flops / (2 * 2048**3 / best)


if __name__ == "__main__":
    main()
