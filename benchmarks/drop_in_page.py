"""Put the numbers of benchmarks/drop_in.py into docs/drop-in.md.

    python benchmarks/drop_in_page.py
    python benchmarks/drop_in_page.py --check

Blocks are marked as in docs/codecs.md.
"""

from __future__ import annotations

from typing import Any

from codec_pages import BLOCK, ROOT, fill, result_file, table_of

PAGE = ROOT / "docs" / "drop-in.md"


def main() -> None:
    fill(PAGE, filled, __doc__)


def filled(page: str) -> str:
    """The page with every block written anew."""
    results = result_file("drop_in.json")
    blocks = {
        "federated": _federated(results["federated"]),
        "open_loop": _open_loop(results["open_loop_snr_db"]),
    }
    return BLOCK.sub(lambda m: m[1] + blocks[m[2]] + m[3], page)


def _federated(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for codec, own in results.items():
        low, middle, high = (100 * own["accuracy"][at] for at in ("min", "median", "max"))
        label = "plain arrays" if codec == "plain" else f"`{codec}`"
        accuracy = f"{middle:.1f} % ({low:.1f} to {high:.1f})"
        fewer = "" if codec == "plain" else f"{own['times_fewer']:.3g}x"
        lines.append([label, f"{own['bytes_per_reply']:,}", fewer, accuracy])
    return table_of(["bytes a reply", "fewer", "accuracy, median (range)"], lines, first="codec")


def _open_loop(results: dict[str, dict[str, float]]) -> str:
    rates = list(next(iter(results.values())))
    lines = [[f"`{codec}`", *(f"{own[r]:.2f}" for r in rates)] for codec, own in results.items()]
    return table_of(rates, lines, first="codec")


if __name__ == "__main__":
    main()
