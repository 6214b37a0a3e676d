"""Zstandard frames from elsewhere, opened into no more memory than was expected."""

from __future__ import annotations

import zstandard

# no frame of a level up to 19 asks for a larger window (RFC 8878 advises to accept this much)
_LARGEST_WINDOW = 8 << 20


class FrameError(ValueError):
    """Bytes are no frame of the size expected; the caller says so by an error of its own."""


def open_frame(frame: bytes, *, least: int, most: int) -> bytes:
    """Content of the one frame that these bytes are.

    What a frame claims is compared with what the caller knows before anything is allocated.

    Parameters
    ----------
    least, most : int
        Lengths that the content can have, in bytes.

    Raises
    ------
    FrameError
        If it is damaged, does not say its size, has another one, needs a dictionary or a window
        larger than its content and 8 MiB, or anything follows it.
    """
    try:
        about = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise FrameError(f"it is not a Zstandard frame ({error})") from None
    size = about.content_size
    if size == zstandard.CONTENTSIZE_UNKNOWN:
        raise FrameError("it is a Zstandard frame that does not say its size")
    if not least <= size <= most or about.dict_id:
        wanted = f"{most} bytes" if least == most else f"{least} to {most} bytes"
        raise FrameError(
            f"it is a Zstandard frame of {size} bytes with dictionary {about.dict_id}; {wanted} "
            "and no dictionary are needed"
        )
    if about.window_size > max(most, _LARGEST_WINDOW):
        raise FrameError(f"it is a Zstandard frame with a window of {about.window_size} bytes")
    try:
        # the size is known and right: exactly that much is allocated, and must be filled
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameError(f"it is damaged ({error})") from None
