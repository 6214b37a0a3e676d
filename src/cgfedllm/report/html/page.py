"""From a view to one file: HTML with its style inside, no script, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cgfedllm.report.html import charts
from cgfedllm.report.html.compare_page import compare_page
from cgfedllm.report.html.reading import read_run
from cgfedllm.report.html.run_page import run_page
from cgfedllm.report.summary import PHASES
from cgfedllm.runs import RunFolder
from cgfedllm.storage import write_atomic


def write_run_report(folder: RunFolder, to: Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Parameters
    ----------
    folder : RunFolder
        The run.
    to : Path, optional
        Where to; ``report.html`` in the run folder by default.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CheckpointError
        If it is not a run folder; damaged files in it are told of in the report.
    StorageError
        If it cannot be written.
    """
    page = render("run.html", run_page(read_run(folder)))
    target = folder.report_path if to is None else to
    write_atomic(target, page)
    return target


def write_comparison(folders: Sequence[RunFolder], to: Path) -> Path:
    """Write one report that compares runs.

    Raises
    ------
    CheckpointError
        If one of them is not a run folder.
    StorageError
        If it cannot be written.
    """
    page = render("compare.html", compare_page([read_run(folder) for folder in folders]))
    write_atomic(to, page)
    return to


def render(template: str, values: dict[str, Any]) -> bytes:
    """Fill a template in; whatever comes from data is escaped.

    Parameters
    ----------
    template : str
        File in ``templates``.
    values : dict
        What it shows.

    Returns
    -------
    bytes
        UTF-8. Half a surrogate pair, which a JSON text may hold, becomes a question mark.
    """
    style = files(__package__).joinpath("templates/report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = (
        _environment()
        .get_template(template)
        .render(**values, style=style, style_hash=digest, canvas=charts, phases=(*PHASES, "other"))
    )
    return page.encode(errors="replace")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cgfedllm.report.html"),
        autoescape=True,  # everywhere, whatever a template is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """Let a name that has no spaces be folded after its marks, not within a word."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/:-])(?=\w)", name))
