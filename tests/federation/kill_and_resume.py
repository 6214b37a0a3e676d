"""Kills runs at chosen points and resumes them; `test_resume_after_kill.py` looks at the results.

::

    python kill_and_resume.py CONFIG.toml SCENARIO...

This process warms up once (imports, a small run of its own) and forgets what it loaded. Each run is
a fork of it, so each starts as a fresh process does, without the seconds that imports take. Every
child that is killed dies of SIGKILL: no handler, no cleanup, no flush.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import cgfedllm
from cgfedllm import events, workspace
from cgfedllm.config import Config, load_config
from cgfedllm.federation import client_app, server_app
from cgfedllm.runs import RunFolder

Listener = Callable[[events.Event], None]

# every piece of state there is matters to a run with these
SETTINGS = (
    "uplink.name=int8",
    "downlink.name=int8",
    "federation.strategy.name=fedadam",
    "lora.dropout=0.1",
    "training.keep_optimizer=true",
    "model.device=cpu",
)


def die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


# ---- points -------------------------------------------------------------------------------------


def at_event(kind: type, round_: int, number: int, **fields: Any) -> Callable[[], Listener]:
    """At the `number`-th event of a kind in a round, of those whose fields are these."""

    def arm() -> Listener:
        now = seen = 0

        def listen(event: events.Event) -> None:
            nonlocal now, seen
            if isinstance(event, events.RoundStarted):
                now, seen = event.round, 0
            if isinstance(event, kind) and all(getattr(event, k) == v for k, v in fields.items()):
                seen += 1
                if (now, seen) == (round_, number):
                    die()

        return listen

    return arm


def at_rename(name: str, *, after: bool = False) -> Callable[[], Listener]:
    """When a file of that name is written, and not yet (or just) put in its place."""

    def arm() -> Listener:
        replace = Path.replace

        def replacing(self: Path, target: Path) -> Path:
            if Path(target).name == name:
                if after:
                    replace(self, target)
                die()
            return replace(self, target)

        Path.replace = replacing  # type: ignore[method-assign]
        return lambda event: None

    return arm


def in_the_middle_of_writing(name: str) -> Callable[[], Listener]:
    """When half of a file's content is on the disk."""

    def arm() -> Listener:
        opened, write = os.open, os.write
        ours: set[int] = set()

        def opening(path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor = opened(path, *args, **kwargs)
            ours.discard(descriptor)
            if name in Path(os.fsdecode(path)).name:
                ours.add(descriptor)
            return descriptor

        def writing(descriptor: int, content: Any) -> int:
            if descriptor in ours:
                write(descriptor, content[: len(content) // 2])
                die()
            return write(descriptor, content)

        os.open, os.write = opening, writing  # type: ignore[assignment]
        return lambda event: None

    return arm


def before_metrics_line(round_: int, *, half: bool = False) -> Callable[[], Listener]:
    """After the checkpoint, before its line (or with half of it there)."""

    def arm() -> Listener:
        append = RunFolder.append

        def appending(self: RunFolder, record: Any) -> None:
            if record.round == round_:
                if half:
                    line = json.dumps(record.to_dict())
                    with self.metrics_path.open("a") as file:
                        file.write(line[: len(line) // 2])
                die()
            append(self, record)

        RunFolder.append = appending  # type: ignore[method-assign]
        return lambda event: None

    return arm


def before_call(module: Any, function: str) -> Callable[[], Listener]:
    def arm() -> Listener:
        setattr(module, function, die)
        return lambda event: None

    return arm


def after_memory_saved(round_: int, number: int) -> Callable[[], Listener]:
    """After a client's residual and moments are on the disk, before its reply is on its way."""

    def arm() -> Listener:
        save = client_app.ClientState.save_memory
        seen = 0

        def saving(self: Any, round: int, **kwargs: Any) -> None:
            nonlocal seen
            save(self, round, **kwargs)
            seen += round == round_
            if seen == number:
                die()

        client_app.ClientState.save_memory = saving  # type: ignore[method-assign]
        return lambda event: None

    return arm


def every(ticks: int) -> Callable[[], Listener]:
    """After so many events and renamed files, wherever that is."""

    def arm() -> Listener:
        left = ticks
        replace = Path.replace

        def tick() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                die()

        def replacing(self: Path, target: Path) -> Path:
            tick()
            return replace(self, target)

        Path.replace = replacing  # type: ignore[method-assign]
        return lambda event: tick()

    return arm


# what a run of 3 rounds passes through, in order
POINTS: dict[str, Callable[[], Listener]] = {
    "evaluation before the first round": at_event(events.EvaluationProgress, 0, 2),
    "first checkpoint half written": in_the_middle_of_writing("round-000000"),
    "round 1 done, its checkpoint and its line there": at_event(events.RoundFinished, 1, 1),
    "round 2 begun, nothing sent": at_event(events.RoundStarted, 2, 1),
    "client 2 in the middle of its training": at_event(events.StepFinished, 2, 3),
    "client 2's memory half written": in_the_middle_of_writing("memory-000002"),
    "client 2's memory saved, not replied": after_memory_saved(2, 2),
    "two replies of three decoded": at_event(events.UpdateReceived, 2, 2),
    "all replied, held-out set evaluated": at_event(
        events.EvaluationProgress, 2, 1, what="held-out"
    ),
    "reference half written": in_the_middle_of_writing("reference-000002"),
    "clients evaluated": at_event(events.EvaluationProgress, 2, 1, what="west"),
    "aggregated and evaluated, no checkpoint": at_event(events.RoundAggregated, 2, 1),
    "checkpoint half written": in_the_middle_of_writing("round-000002"),
    "checkpoint written, not yet in its place": at_rename("round-000002.safetensors"),
    "checkpoint there, its line not": before_metrics_line(2),
    "checkpoint there, half of its line": before_metrics_line(3, half=True),
    "last round done, adapter not saved": before_call(server_app, "save_adapter"),
    "adapter's weights half written": in_the_middle_of_writing("adapter_model.safetensors"),
    "adapter's weights there, its config not": at_rename("adapter_config.json"),
    "adapter there, process not yet ended": at_rename("adapter_config.json", after=True),
}
LAST_ROUND = "checkpoint there, half of its line"
EACH_IN_TURN = "killed at each point in turn"
DAMAGED = "newest checkpoint damaged after a kill in round 3"
AGAIN_AND_AGAIN = "killed again and again"

# what the flush after them passes through
FLUSH_POINTS: dict[str, Callable[[], Listener]] = {
    "all asked for their residuals": at_event(events.RoundStarted, 4, 1),
    "one residual sent": at_event(events.ClientFinished, 4, 1),
    "all residuals in": at_event(events.EvaluationProgress, 4, 1, what="held-out"),
    "checkpoint of the flush half written": in_the_middle_of_writing("round-000004"),
    "checkpoint of the flush there, its line not": before_metrics_line(4),
    "flushed, adapter not saved": before_call(server_app, "save_adapter"),
}
IN_THE_FLUSH = "killed in each round and at each point of the flush"

# what a run of 3 rounds passes through whose uplink codec adapts after each
CODEC_POINTS: dict[str, Callable[[], Listener]] = {
    "first checkpoint half written": POINTS["first checkpoint half written"],
    "a client's codec state half written": in_the_middle_of_writing("codec-000001"),
    "client 2 in the middle of its training": POINTS["client 2 in the middle of its training"],
    "client 2's memory saved, not replied": POINTS["client 2's memory saved, not replied"],
    "checkpoint half written": POINTS["checkpoint half written"],
    "checkpoint there, its line not": POINTS["checkpoint there, its line not"],
    "the codec half written": in_the_middle_of_writing("codec.safetensors"),
    "the codec there, the adapter not": before_call(server_app, "save_adapter"),
}
AROUND_THE_CODEC = "killed at each point in turn of a run whose codec adapts"


# ---- processes ----------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> int | None:
    """Run in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(work: Callable[..., Any], arm: Callable[[], Listener]) -> bool:
    """Whether the work was killed; anything else but success is an error of the test's own."""

    def armed() -> None:
        work(listeners=[arm()])

    status = in_child(armed)
    assert status in (0, -signal.SIGKILL), status
    return status == -signal.SIGKILL


def scenario(name: str, config: Config) -> dict[str, Any]:
    begun = config.run_dir.with_suffix(".begun")
    begun.touch()

    def note(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted):
            with begun.open("a") as file:
                file.write(f"{event.round}\n")

    def start(listeners: Iterable[Listener] = ()) -> None:
        cgfedllm.run(config, listeners=[note, *listeners])

    def go_on(listeners: Iterable[Listener] = ()) -> None:
        cgfedllm.resume(config.run_dir, listeners=[note, *listeners])

    kills, work = 0, start
    match name:
        case "unbroken":
            assert in_child(start) == 0
            return {"kills": 0, "rounds_begun": numbers(begun)}
        case _ if name == AGAIN_AND_AGAIN:
            # more than a round has, and no multiple of it: each kill hits another place
            while kills < 20 and killed(work, every(41)):
                kills += 1
                work = go_on if RunFolder(config.run_dir).exists() else start
        case _ if name == DAMAGED:
            kills += killed(start, after_memory_saved(3, 3))
            newest = config.run_dir / "checkpoints" / "round-000002.safetensors"
            content = bytearray(newest.read_bytes())
            content[len(content) // 2] ^= 1
            newest.write_bytes(content)
        case _ if name in (IN_THE_FLUSH, AROUND_THE_CODEC):
            names = list(POINTS)
            # the flush comes before all that ends a run
            rounds = {name: POINTS[name] for name in names[: names.index(LAST_ROUND)]}
            points = rounds | FLUSH_POINTS if name == IN_THE_FLUSH else CODEC_POINTS
            for point, arm in points.items():
                assert killed(work, arm), f"never came to: {point}"
                kills += 1
                work = go_on
        case _:
            every_point = POINTS | FLUSH_POINTS | CODEC_POINTS
            for point in POINTS if name == EACH_IN_TURN else [name]:
                assert killed(work, every_point[point]), f"never came to: {point}"
                kills += 1
                work = go_on
    assert in_child(go_on) == 0
    return {"kills": kills, "rounds_begun": numbers(begun)}


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


def main(config_file: str, names: list[str]) -> None:
    # from beside this file; they register codecs
    import learned_codecs  # noqa: F401
    import previous_codec  # noqa: F401

    base = load_config(config_file)
    cgfedllm.run(base.with_overrides({"name": "warm-up", "federation.rounds": 1}))
    workspace.workspace_for.cache_clear()
    workspace._shared_model.cache_clear()
    results = {}
    for number, name in enumerate(names):
        config = base.with_overrides({"name": f"run-{number:02d}"})
        results[name] = {"run_dir": str(config.run_dir), **scenario(name, config)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["unbroken", EACH_IN_TURN, DAMAGED, AGAIN_AND_AGAIN])
