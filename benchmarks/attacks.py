"""Clients that lie: Flower mods that spoil what a client has trained before it is coded.

    app = make_client_app(attack("flip5", {"CDC", "GARD"}))

A mod stands inside compression, so a lie is clipped, coded and fed back like any honest update.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from flwr.app import Context, Message

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.federation.client_app import ClientFunction, ClientMod, open_session
from cgfedllm.federation.messages import (
    ARRAYS,
    CONFIG,
    SERVER_ROUND,
    adapter_of,
    adapter_record,
)
from cgfedllm.seeding import generator

NOISE = 10.0
"""Norm of noise, in norms of the honest update."""
FACTORS = {"scale10": 10.0, "flip": -1.0, "flip5": -5.0}
ATTACKS = (*FACTORS, "noise")


def attack(kind: str, liars: Collection[str]) -> ClientMod:
    """A mod that spoils the updates of some clients.

    Parameters
    ----------
    kind : str
        "scale10": ten times the honest update. "flip", "flip5": minus one and minus five times.
        "noise": normal noise of ten times its norm in its place.
    liars : collection of str
        Names of clients.
    """

    def lie(message: Message, context: Context, call_next: ClientFunction) -> Message:
        session = open_session(message, context)
        spec, name = session.workspace.spec, session.data.name
        start = adapter_of(spec, message.content.array_records[ARRAYS])
        round_ = int(message.content.config_records[CONFIG][SERVER_ROUND])  # type: ignore[arg-type]
        reply = call_next(message, context)
        if name in liars:
            honest = adapter_of(spec, reply.content.array_records[ARRAYS]) - start
            reply.content[ARRAYS] = adapter_record(start + spoilt(kind, honest, name, round_))
        return reply

    return lie


def spoilt(kind: str, honest: AdapterUpdate, client: str, round_: int) -> AdapterUpdate:
    """What a liar sends in place of an honest update."""
    if kind in FACTORS:
        return honest.scaled(FACTORS[kind])
    if kind != "noise":
        raise ValueError(f"no attack {kind!r}; there are {', '.join(ATTACKS)}")
    values = generator(0, "attack", client, round_).standard_normal(honest.spec.size)
    noise = AdapterUpdate(honest.spec, values.astype(np.float32))
    return noise.scaled(NOISE * honest.norm() / noise.norm())
