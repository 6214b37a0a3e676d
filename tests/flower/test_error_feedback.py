"""What a packet loses is added to the client's next reply, in memory or on disk, or never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.clientapp import ClientApp

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.errors import CodecError
from cgfedllm.flower import compression
from cgfedllm.flower.memory import open_memory

from .apps import Arrays, app_of, arrays_in, grid_of, record_of, wrapped

COARSE = "sign"
RNG = np.random.default_rng(7)
START: Arrays = {"w": RNG.standard_normal((40, 64)).astype(np.float32)}
STEP = RNG.standard_normal((40, 64)).astype(np.float32)


def same_step(arrays: Arrays, node: int, round_: int) -> Arrays:
    return {"w": arrays["w"] + STEP}


class Rounds:
    """One client, asked round by round; each time for a change of `START`."""

    def __init__(self, app: ClientApp, partitions: dict[int, int] | None = None) -> None:
        self.grid = grid_of(app, [2], partitions)

    def blob(self, round_: int) -> bytes:
        strategy = wrapped(COARSE)
        sent = strategy.configure_train(round_, record_of(START), ConfigRecord(), self.grid)
        (reply,) = self.grid.send_and_receive(sent)
        assert reply.has_content(), reply.error.reason
        (array,) = reply.content["arrays"].values()
        return array.data


def missing_after(rounds: int, codec: str, **options: Any) -> float:
    """Share of all steps so far that the server does not have."""
    strategy, grid = wrapped(codec), grid_of(app_of(codec, same_step, **options), [2])
    result = strategy.start(grid, record_of(START), num_rounds=rounds)
    wanted = START["w"] + rounds * STEP
    left = arrays_in(result.arrays)["w"] - wanted
    return float(np.linalg.norm(left) / np.linalg.norm(rounds * STEP))


def test_feedback_makes_up_for_what_packets_lose() -> None:
    assert missing_after(6, "sign") < 0.6 * missing_after(6, "sign", stateless=True)
    assert missing_after(6, "sign") < 0.6 * missing_after(1, "sign")


def test_a_decay_forgets() -> None:
    blobs = {decay: Rounds(app_of(COARSE, same_step, decay=decay)) for decay in (0.0, 0.5, 1.0)}
    first = {decay: rounds.blob(1) for decay, rounds in blobs.items()}
    assert len(set(first.values())) == 1
    assert len({rounds.blob(2) for rounds in blobs.values()}) == 3
    with pytest.raises(CodecError, match=r"decay is 1\.5"):
        compression(COARSE, decay=1.5)


@pytest.mark.parametrize("codec", ["raw", "qsgd:unbiased=true", "eden:bpp=1,scaling=unbiased"])
def test_nothing_is_kept_for_codecs_that_lose_nothing_or_are_unbiased(codec: str) -> None:
    grid = grid_of(app_of(codec, same_step), [2])
    wrapped(codec).start(grid, record_of(START), num_rounds=1)
    assert not grid._contexts[2].state


def test_clients_of_one_process_keep_to_themselves() -> None:
    def own_step(arrays: Arrays, node: int, round_: int) -> Arrays:
        return {"w": arrays["w"] + STEP * np.float32(node)}

    grid = grid_of(app_of(COARSE, own_step), [2, 3])
    wrapped(COARSE).start(grid, record_of(START), num_rounds=1)
    two, three = (
        next(iter(grid._contexts[node].state["cgfedllm.residuals"].values())).numpy()
        for node in (2, 3)
    )
    assert np.abs(two - three).max() > 0.1


@pytest.fixture(params=["context", "disk"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> ClientApp:
    state_dir = tmp_path if request.param == "disk" else None
    return app_of(COARSE, same_step, state_dir=state_dir)


def test_a_round_that_is_asked_for_again_is_answered_alike(app: ClientApp) -> None:
    rounds = Rounds(app)
    first, second = rounds.blob(1), rounds.blob(2)
    assert rounds.blob(2) == second
    third = rounds.blob(3)
    assert rounds.blob(3) == third
    assert len({first, second, third}) == 3


def test_on_disk_a_server_may_go_back_two_rounds(tmp_path: Path) -> None:
    rounds = Rounds(app_of(COARSE, same_step, state_dir=tmp_path))
    answers = [rounds.blob(round_) for round_ in (1, 2, 3)]
    assert [rounds.blob(2), rounds.blob(3)] == answers[1:]


def test_a_client_that_missed_rounds_goes_on_from_its_last(app: ClientApp) -> None:
    rounds, other = Rounds(app), Rounds(app_of(COARSE, same_step))
    rounds.blob(1)
    other.blob(1)
    other.blob(2)
    away = rounds.blob(5)
    again = Rounds(app_of(COARSE, same_step))
    again.blob(1)
    assert again.blob(5) == away
    assert other.blob(5) != away


def test_a_round_that_could_not_be_sent_leaves_no_trace() -> None:
    """A bias that is not finite stops the reply; what the matrix would have left is not kept."""

    def fail_once(arrays: Arrays, node: int, round_: int) -> Arrays:
        bad = np.float32(np.nan if round_ == 1 else 1)
        return {"w": arrays["w"] + STEP, "b": np.full(3, bad)}

    start = START | {"b": np.zeros(3, np.float32)}
    grid = grid_of(app_of(COARSE, fail_once), [2])
    sent = wrapped(COARSE).configure_train(1, record_of(start), ConfigRecord(), grid)
    (reply,) = grid.send_and_receive(sent)
    assert "'b' holds NaN" in reply.error.reason
    assert not grid._contexts[2].state


# ---- where it is kept ---------------------------------------------------------------------------


def test_on_disk_it_outlives_the_process(tmp_path: Path) -> None:
    unbroken = Rounds(app_of(COARSE, same_step))
    expected = [unbroken.blob(1), unbroken.blob(2)]
    app = app_of(COARSE, same_step, state_dir=tmp_path)
    # another grid has other contexts, as a SuperNode that was started again has
    assert [Rounds(app).blob(1), Rounds(app).blob(2)] == expected


def test_on_disk_each_run_and_partition_has_a_folder(tmp_path: Path) -> None:
    app = app_of(COARSE, same_step, state_dir=tmp_path)
    Rounds(app, {2: 7}).blob(1)
    Rounds(app).blob(1)
    folders = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("memory-*"))
    assert folders == ["run-1/node-2", "run-1/partition-7"]


def test_in_memory_two_rounds_are_kept_and_no_residual_of_other_arrays() -> None:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    spec, other = _spec(3), _spec(4)
    memory = open_memory(context, spec, None)
    for round_ in (1, 2, 3):
        memory.save_memory(round_, residual=_update(spec, round_))
    kept = context.state["cgfedllm.residuals"]
    assert isinstance(kept, ArrayRecord)
    assert len(kept) == 2
    found = memory.residual(3)
    assert found is not None
    assert found.vector[0] == 2
    assert memory.residual(2) is None
    assert open_memory(context, other, None).residual(9) is None


def _spec(rows: int) -> AdapterSpec:
    return AdapterSpec.from_shapes({"w": (rows, 100)})


def _update(spec: AdapterSpec, value: int) -> AdapterUpdate:
    return AdapterUpdate(spec, np.full(spec.size, value, np.float32))
