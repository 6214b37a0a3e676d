"""Codecs whose packets are whole numbers at one fixed step, so that sums of them decode to sums.

::

    update --encode--> packet --levels--> integers x_i ,  |x_i| <= reach
    sum of x_i over clients --packet_of--> packet --decode--> sum of what the packets decode to

Secure aggregation needs this: it hands the server the sum of the integers and nothing else.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs.base import Codec, CodecContext

Int32Array = NDArray[np.int32]


class LinearCodec(Codec):
    """A codec that can be linear, where its options fix the step for all clients."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Largest magnitude of a number in a client's packet.

        Raises
        ------
        CodecError
            If the options leave the step to each packet, so that integers of two packets do not
            add up. The message says what to set.
        """

    @abstractmethod
    def numbers(self, spec: AdapterSpec) -> int:
        """How many numbers a packet for this adapter holds."""

    @abstractmethod
    def levels(self, blob: bytes, context: CodecContext) -> Int32Array:
        """The integers in a packet, shape (numbers,).

        Raises
        ------
        PacketError
            As `decode`.
        """

    @abstractmethod
    def packet_of(self, levels: NDArray[Any], context: CodecContext) -> bytes:
        """A packet that holds these integers, which may be a sum of several packets'.

        Parameters
        ----------
        levels : ndarray of int, shape (numbers,)
            Of magnitude below 2^31.
        context : CodecContext
            Of the packets that were added.
        """
