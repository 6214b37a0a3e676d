"""Put the numbers of benchmarks/results/robust.json into docs/robustness.md.

    python benchmarks/robust_page.py
    python benchmarks/robust_page.py --check

Blocks are marked as in docs/codecs.md. A run that was not made leaves its cell empty.
"""

from __future__ import annotations

from typing import Any

from codec_pages import BLOCK, ROOT, fill, result_file, table_of

PAGE = ROOT / "docs" / "robustness.md"
ATTACKS = {
    "none": "nobody lies",
    "scale10": "ten times the update",
    "flip": "minus the update",
    "flip5": "minus five times the update",
    "noise": "noise of ten times its norm",
}


def main() -> None:
    fill(PAGE, filled, __doc__)


def filled(page: str) -> str:
    """The page with every block written anew."""
    results = result_file("robust.json")
    blocks = {"losses": _losses(results), "screening": _screening(results["results"])}
    return BLOCK.sub(lambda m: m[1] + blocks[m[2]] + m[3], page)


def _losses(results: dict[str, Any]) -> str:
    """Loss after the last round, and how far it is from that of the plain mean with no liar."""
    rows = {(row["attack"], row["defence"]): row["heldout_nll"] for row in results["results"]}
    clean = _last(rows["none", "fedavg"])
    asked = [name for name in results["defences"] if any(name == of for _, of in rows)]
    # how much there is to lose
    start = {0: rows["none", "fedavg"]["0"]}
    lines = [["before any training", _cell(start, clean), *[""] * (len(asked) - 1)]]
    for attack, words in ATTACKS.items():
        cells = [_cell(rows.get((attack, name)), clean) for name in asked]
        if any(cells):
            lines.append([words, *cells])
    return table_of(asked, lines, first="two of nine send")


def _cell(curve: dict[Any, float] | None, clean: float) -> str:
    if curve is None:
        return ""
    loss = _last(curve)
    return f"{loss:.3f} ({100 * (loss / clean - 1):+.1f} %)"


def _last(curve: dict[Any, float]) -> float:
    return curve[max(curve, key=int)]


def _screening(rows: list[dict[str, Any]]) -> str:
    """What was found in the runs in which nothing was left out."""
    lines = []
    for attack, words in ATTACKS.items():
        for row in rows:
            if (row["attack"], row["defence"]) != (attack, "fedavg"):
                continue
            for who in ("liars", "honest"):
                found = row["screened"][who]
                if found["updates"]:
                    odd = f"{found['odd']} of {found['updates']}"
                    ranges = [_range(found["norm_ratio"]), _range(found["cosine"])]
                    lines.append([f"{words}: {who}", odd, *ranges])
    return table_of(["found odd", "norm ratio", "cosine"], lines, first="two of nine send")


def _range(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


if __name__ == "__main__":
    main()
