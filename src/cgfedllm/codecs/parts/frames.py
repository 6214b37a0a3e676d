"""Zstandard frames (RFC 8878) from somebody else, opened within bounds."""

from __future__ import annotations

import zstandard

from cgfedllm.errors import PacketError

# no frame of a level up to 19 asks for a larger window (RFC 8878 advises to accept this much)
_LARGEST_WINDOW = 8 << 20


def decompressed(frame: bytes, size: int, who: str) -> bytes:
    """Content of a frame that must hold exactly `size` bytes.

    Whatever the frame claims is compared with `size` before anything is allocated.

    Parameters
    ----------
    who : str
        Whose payload it is, for messages.

    Raises
    ------
    PacketError
        If it is no frame, one of another size, or damaged.
    """
    try:
        found = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise PacketError(f"{who}: payload is not a Zstandard frame ({error})") from None
    if found.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise PacketError(f"{who}: payload is a frame that does not say its size")
    if found.content_size != size or found.dict_id:
        raise PacketError(
            f"{who}: payload is a frame of {found.content_size} bytes with dictionary "
            f"{found.dict_id}; this adapter needs {size} bytes and no dictionary"
        )
    if found.window_size > max(size, _LARGEST_WINDOW):
        raise PacketError(f"{who}: payload asks for a window of {found.window_size} bytes")
    try:
        # content size is known and right: exactly that much is allocated, and must be filled
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PacketError(f"{who}: payload is damaged ({error})") from None
