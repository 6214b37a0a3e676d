"""Text that others wrote, made fit to be shown and kept."""

from __future__ import annotations

MOST = 1000
"""Characters of somebody else's text that are shown or written down."""


def printable(text: str, most: int = MOST) -> str:
    """One line of a text, safe for terminals and logs.

    Runs of white space become one space. What cannot be printed (terminal escapes and other control
    characters, marks that change the direction of writing, lone surrogates) becomes ``?``.

    Parameters
    ----------
    text : str
        Of a client, a server, or a file from elsewhere.
    most : int
        Characters to keep; a longer text ends in ``...``.
    """
    # cut first: the work, too, is to depend on `most` and not on the text
    line = " ".join(text[: 2 * most].split())
    cut = len(line) > most or len(text) > 2 * most
    shown = "".join(c if c.isprintable() else "?" for c in line[:most])
    return f"{shown}..." if cut else shown
