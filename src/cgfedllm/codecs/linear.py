"""Codecs whose packets are whole numbers at one fixed step, so that sums of them decode to sums.

::

    update --encode--> packet --levels--> integers x_i ,  |x_i| <= reach
    sum of x_i over clients --packet_of--> packet --decode--> sum of what the packets decode to

Secure aggregation needs this: it hands the server the sum of the integers and nothing else.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs.base import Codec, CodecContext
from cgfedllm.codecs.entropy import Int32Array
from cgfedllm.codecs.parts.integers import (
    HEAD_BYTES,
    LARGEST_EXPONENT,
    SMALLEST_EXPONENT,
    read_integers,
    width_of,
    write_integers,
)
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import CodecError, PacketError


class LinearOptions(RateOptions):
    """Rate, and size and step of whole numbers."""

    bits: int = Field(default=8, ge=2, le=16, description="Bits of each number.")
    scale_exponent: int | None = Field(
        default=None,
        ge=SMALLEST_EXPONENT,
        le=LARGEST_EXPONENT,
        description="Fixed step of the numbers, as a power of two. Packets of one fixed step add "
        "up as plain integers, as secure aggregation needs; chosen for each update if not set.",
    )


class LinearCodec(Codec):
    """A codec that is linear where its options fix the step for all clients."""

    options: LinearOptions

    @property
    def reach(self) -> int:
        """Largest magnitude of a number in a client's packet, 2^(bits - 1) - 1.

        What is larger is cut off.

        Raises
        ------
        CodecError
            If the options leave the step to each packet, so that integers of two packets do not
            add up. The message says what to set.
        """
        if self.options.scale_exponent is None:
            raise CodecError(
                f"{self.name}: each packet has a step of its own; set the option scale_exponent "
                "(the step is 2 to that power, e.g. -14) so that packets add up as plain integers"
            )
        return self._top

    @abstractmethod
    def numbers(self, spec: AdapterSpec) -> int:
        """How many numbers a packet for this adapter holds: the same in all rounds of a run."""

    def levels(self, blob: bytes, context: CodecContext) -> Int32Array:
        """The integers in a packet, shape (numbers,); at the fixed step, where there is one.

        Raises
        ------
        PacketError
            As `decode`, or if the packet has another step.
        """
        levels, exponent = self._integers(self._open(blob, context).payload, context)
        if self.options.scale_exponent not in (None, exponent) and levels.any():
            raise PacketError(
                f"{self.name}: the packet's scale exponent is {exponent}, "
                f"not {self.options.scale_exponent} as agreed"
            )
        return levels

    def packet_of(self, levels: NDArray[Any], context: CodecContext) -> bytes:
        """A packet that holds these integers, which may be a sum of several packets'.

        Parameters
        ----------
        levels : ndarray of int, shape (numbers,)
            Of magnitude below 2^31, at the fixed step.
        context : CodecContext
            Of the packets that were added.
        """
        assert self.options.scale_exponent is not None
        payload = self._of_integers(levels, self.options.scale_exponent, context)
        return self._sealed(payload, replace(context, previous=None))

    @property
    def _top(self) -> int:
        return int((1 << (self.options.bits - 1)) - 1)

    def _room(self, spec: AdapterSpec, beside: int = 0) -> int:
        """How many numbers the rate has room for, with so many bytes beside them."""
        budget = payload_bits(spec, self.options.bpp) - 8 * (HEAD_BYTES + beside)
        return max(0, int(budget / self.options.bits))

    def _of_integers(self, levels: NDArray[Any], exponent: int, context: CodecContext) -> bytes:
        """A payload of numbers, as wide as they need and no less than `bits`."""
        return write_integers(levels, max(self.options.bits, width_of(levels)), exponent)

    def _integers(self, payload: bytes, context: CodecContext) -> tuple[Int32Array, int]:
        """Inverse of `_of_integers`: numbers, and the exponent of their step."""
        return read_integers(payload, self.numbers(context.spec), self.name)
