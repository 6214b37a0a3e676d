"""Signatures and docstring summaries of installed libraries, read from source, never run.

A library is found without importing it, its files are parsed with `ast`, and of each public
function, method and class the signature is printed anew and the first paragraph of its docstring
is kept.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_SKIPPED_FOLDERS = {
    "_vendor", "vendor", "third_party", "test", "tests", "testing", "examples", "proto",
}  # fmt: skip
_LARGEST_FILE = 150_000
_SIGNATURE_CHARACTERS = (12, 480)
_SUMMARY_CHARACTERS = (30, 280)
_SUMMARY_WORDS = 5
# paragraphs that say nothing of what the function does, or were copied from somewhere
_BOILERPLATE = re.compile(
    r"deprecat|experimental|^\.\. |>>>|^(see |alias |internal|todo|note[: ]|private|copied|same as"
    r"|args?:|parameters?\b|returns?:|raises:|overrid|warning|[\w.]+ ?\()|not intended|do not use"
    r"|http",
    re.IGNORECASE,
)
_PRINTABLE = re.compile(r"[ -~]+")


@dataclass(frozen=True)
class Documented:
    """One documented thing.

    Parameters
    ----------
    module : str
        Dotted path of the module.
    name : str
        ``function``, ``Class`` or ``Class.method``.
    kind : str
        "function", "method" or "class".
    signature : str
        Python source, one or two lines, without body.
    summary : str
        First paragraph of the docstring on one line.
    """

    module: str
    name: str
    kind: str
    signature: str
    summary: str


def library_folder(library: str) -> Path | None:
    """Where an installed package has its sources, without importing it; None if it is absent."""
    try:
        spec = find_spec(library)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder if folder.is_dir() else None


def documented(library: str, folder: Path, limit: int) -> list[Documented]:
    """About `limit` documented things of a library, the same ones every time.

    Files are taken in an order drawn from their paths until `limit` is reached: reading all of a
    large library would take half a minute, and its first files by name are all on one subject.

    Parameters
    ----------
    library : str
        Import name.
    folder : Path
        Its sources.
    limit : int
        Stop after the file that reaches it.

    Returns
    -------
    list of Documented
        Signatures and summaries are distinct (summaries without regard to case).
    """
    found: list[Documented] = []
    signatures: set[str] = set()
    summaries: set[str] = set()
    for path in _files(folder):
        module = ".".join((library, *path.relative_to(folder).with_suffix("").parts))
        for item in _in_file(path, module.removesuffix(".__init__")):
            if item.signature in signatures or item.summary.lower() in summaries:
                continue
            signatures.add(item.signature)
            summaries.add(item.summary.lower())
            found.append(item)
        if len(found) >= limit:
            break
    return found


def _files(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(path.relative_to(folder).parts[:-1])
        and not path.name.startswith(("test_", "conftest"))
    ]
    return sorted(files, key=lambda path: _digest(path.relative_to(folder).as_posix()))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _in_file(path: Path, module: str) -> Iterator[Documented]:
    try:
        source = path.read_bytes()
        if len(source) > _LARGEST_FILE:
            return
        with warnings.catch_warnings():
            # invalid escapes in somebody else's strings
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(node, module)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _class(node, module)


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, owner: str | None = None
) -> Iterator[Documented]:
    # the summary first: most functions fall here, and printing signatures is slow
    summary = _summary(node)
    if summary is None:
        return
    signature = _signature(node)
    if owner is None:
        yield from _item(module, node.name, "function", signature, summary)
    else:
        signature = f"class {owner}:\n    {signature}"
        yield from _item(module, f"{owner}.{node.name}", "method", signature, summary)


def _class(node: ast.ClassDef, module: str) -> Iterator[Documented]:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    summary = _summary(node)
    if summary is not None:
        bases = ", ".join(map(ast.unparse, node.bases))
        signature = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
        init = next((method for method in methods if method.name == "__init__"), None)
        if init is not None:
            signature += f"\n    {_signature(init)}"
        yield from _item(module, node.name, "class", signature, summary)
    for method in methods:
        yield from _function(method, module, node.name)


def _item(module: str, name: str, kind: str, signature: str, summary: str) -> Iterator[Documented]:
    shortest, longest = _SIGNATURE_CHARACTERS
    if shortest <= len(signature) <= longest and _is_ascii(signature):
        yield Documented(module, name, kind, signature, summary)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def _is_no_function(decorator: ast.expr) -> bool:
    """Attributes in disguise, whose signatures say nothing, and deprecated functions."""
    text = ast.unparse(decorator)
    return bool(re.search(r"property|\.setter|\.deleter|overload|deprecate", text))


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str | None:
    """The first paragraph of a public thing's docstring, if it says something."""
    if node.name.startswith("_") or any(map(_is_no_function, node.decorator_list)):
        return None
    docstring = ast.get_docstring(node, clean=False)
    if not docstring:
        return None
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    text = " ".join(paragraph.split())
    shortest, longest = _SUMMARY_CHARACTERS
    if not shortest <= len(text) <= longest or len(text.split()) < _SUMMARY_WORDS:
        return None
    if not _is_ascii(text) or _BOILERPLATE.search(text):
        return None
    return text


def _is_ascii(text: str) -> bool:
    return bool(_PRINTABLE.fullmatch(text.replace("\n", " ")))
