"""The embedded demo: every client is an installed Python library.

The story is a code assistant for organisations that keep their code to themselves: each client
learns to write docstrings in its own house style, from its own sources. The rows are made on the
user's machine from packages that are there anyway, so nothing is downloaded or copied, and equal
package versions give equal rows.
"""

from __future__ import annotations

import hashlib

from cgfedllm.data.docstrings import Documented, documented, library_folder
from cgfedllm.data.rows import Row, SourceFile
from cgfedllm.errors import DataError

LIBRARIES = (
    "datasets",
    "huggingface_hub",
    "numpy",
    "pandas",
    "peft",
    "sqlalchemy",
    "torch",
    "transformers",
)
ROWS_PER_LIBRARY = 300
_FEWEST_LIBRARIES = 3
_FEWEST_ROWS = 40
# candidates read per row kept, so that the sample is not a few files whole
_SPARE = 1.5


def demo_files(
    libraries: tuple[str, ...] = LIBRARIES, rows_per_library: int = ROWS_PER_LIBRARY
) -> list[SourceFile]:
    """Docstring-writing rows from installed libraries, one `SourceFile` a library.

    The rows do not depend on the seed of the run: only on the versions installed.

    Parameters
    ----------
    libraries : tuple of str
        Import names; absent ones, and ones with hardly any docstrings, are left out.
    rows_per_library : int
        At most this many rows each.

    Returns
    -------
    list of SourceFile
        Rows have the columns client, module, name, kind, prompt and completion. No prompt and no
        completion occurs twice.

    Raises
    ------
    DataError
        If fewer than three of the libraries can be used.
    """
    files = []
    seen: set[str] = set()
    for library in sorted(libraries):
        folder = library_folder(library)
        if folder is None:
            continue
        candidates = [
            item
            for item in documented(library, folder, int(_SPARE * rows_per_library))
            if item.summary.lower() not in seen
        ]
        chosen = sorted(candidates, key=_draw)[:rows_per_library]
        if len(chosen) < min(_FEWEST_ROWS, rows_per_library):
            continue
        seen.update(item.summary.lower() for item in chosen)
        chosen.sort(key=lambda item: (item.module, item.name, item.signature))
        files.append(
            SourceFile(f"demo/{library}", library, [_row(library, item) for item in chosen])
        )
    if len(files) < _FEWEST_LIBRARIES:
        raise DataError(
            f"the demo needs the sources of at least {_FEWEST_LIBRARIES} of the libraries "
            f"{', '.join(sorted(libraries))}, and {len(files)} can be read here; install them "
            "(`make setup`), or set data.source to data of your own"
        )
    return files


def _draw(item: Documented) -> bytes:
    text = "\x1f".join((item.module, item.name, item.signature))
    return hashlib.sha256(text.encode()).digest()


def _row(library: str, item: Documented) -> Row:
    return {
        "client": library,
        "module": item.module,
        "name": item.name,
        "kind": item.kind,
        "prompt": f"Write the docstring of this {item.kind} from {library}.\n\n{item.signature}",
        "completion": item.summary,
    }
