"""lm-eval's model interface over an adapted model, computing only what is asked for.

Generation is lm-eval's own. For the log-likelihood of options its way is replaced, with the same
results up to rounding:

- options that follow the same prompt share one pass, and the head is computed where they begin;
- prompts are packed end to end where the model allows it, so that nothing is padded;
- what the prompts of a batch begin with alike is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from cgfedllm.evaluation.prefix import shared_prefix, shared_prefix_attention
from cgfedllm.model import AdaptedModel
from cgfedllm.training.attention import supports_packing
from cgfedllm.training.loss import logits_at

Tokens = tuple[int, ...]


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """An adapted model as lm-eval sees models.

    Parameters
    ----------
    model : AdaptedModel
        Scored with the adapter values it has at the time.
    batch_size : int
        Prompts in one pass.
    max_new_tokens : int
        Most tokens of a generated answer.
    told : callable
        Called with the number of requests answered since the last call.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        batch_size: int,
        max_new_tokens: int = 256,
        told: Callable[[int], None] = lambda requests: None,
    ) -> None:
        super().__init__(
            pretrained=model.model,
            tokenizer=model.tokenizer,
            backend="causal",
            batch_size=batch_size,
        )
        self._max_new_tokens = max_new_tokens
        self.told = told

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of a generated answer, where the task does not say."""
        return self._max_new_tokens

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in words, a batch at a time."""
        texts: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            chunk = requests[start : start + self.batch_size]
            texts += super().generate_until(chunk, disable_tqdm=True)
            self.told(len(chunk))
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        asked: dict[Tokens, list[tuple[int, list[int]]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # the last token predicts nothing; too long a prompt loses its beginning
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            asked.setdefault(tokens, []).append((number, continuation))
        rows = sorted(asked, key=len, reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        packed = supports_packing(self.model, len(rows[0])) if rows else False
        with (
            torch.inference_mode(),
            shared_prefix_attention(self.model) if packed else nullcontext(),
        ):
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                keep = [max(len(tail) for _, tail in asked[row]) for row in batch]
                run = self._packed if packed else self._padded
                for row, log_p in zip(batch, run(batch, keep), strict=True):
                    for number, tail in asked[row]:
                        answers[number] = _score(log_p[-len(tail) :], tail)
                self.told(sum(len(asked[row]) for row in batch))
        return answers

    def _packed(self, rows: Sequence[Tokens], keep: Sequence[int]) -> Iterator[torch.Tensor]:
        """Log-probabilities after the last `keep` tokens of each row, (keep, vocabulary)."""
        common = shared_prefix(rows, min(len(r) - k for r, k in zip(rows, keep, strict=True)))
        own = [len(row) - common for row in rows]
        ids = [*rows[0][:common], *(token for row in rows for token in row[common:])]
        positions = [*range(common), *(common + at for length in own for at in range(length))]
        ends = torch.tensor([common, *own]).cumsum(0)[1:].tolist()
        columns = [at for end, k in zip(ends, keep, strict=True) for at in range(end - k, end)]
        logits = logits_at(
            self.model,
            torch.tensor(columns, device=self.device),
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            segment_lengths=(common, *own),
            use_cache=False,
        )[0]
        for chosen in logits.split(list(keep)):
            yield chosen.float().log_softmax(-1)

    def _padded(self, rows: Sequence[Tokens], keep: Sequence[int]) -> Iterator[torch.Tensor]:
        """The same for models whose rows cannot be packed: filled up on the right."""
        width = max(map(len, rows))
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        needed = [range(len(row) - k, len(row)) for row, k in zip(rows, keep, strict=True)]
        columns = sorted(set().union(*needed))
        logits = logits_at(
            self.model,
            torch.tensor(columns, device=self.device),
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            use_cache=False,
        )
        place = {column: at for at, column in enumerate(columns)}
        for of_row, wanted in zip(logits, needed, strict=True):
            yield of_row[place[wanted[0]] : place[wanted[-1]] + 1].float().log_softmax(-1)


def _score(log_p: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    wanted = torch.tensor(continuation, device=log_p.device)
    chosen = log_p.gather(1, wanted[:, None])
    return float(chosen.sum()), bool((log_p.argmax(-1) == wanted).all())
