"""Put the numbers of `cgfedllm reproduce paper` into docs/paper.md.

    python benchmarks/paper_page.py
    python benchmarks/paper_page.py --check

They come from benchmarks/results/paper/paper.json and dp_medquad.json; blocks are marked as in
docs/codecs.md.
"""

from __future__ import annotations

from typing import Any

from codec_pages import BLOCK, ROOT, fill, result_file, table_of

PAGE = ROOT / "docs" / "paper.md"
BENCHMARKS = {"ceval": "C-Eval", "mmlu": "MMLU"}


def main() -> None:
    fill(PAGE, filled, __doc__)


def filled(page: str) -> str:
    """The page with every block written anew."""
    rows = result_file("paper/paper.json")["rows"]
    blocks = {"losses": _losses(rows), **{b: _accuracies(rows, b) for b in BENCHMARKS}}
    blocks["privacy"] = _privacy(result_file("dp_medquad.json"))
    return BLOCK.sub(lambda m: m[1] + blocks[m[2]] + m[3], page)


def _losses(rows: list[dict[str, Any]]) -> str:
    nll = {row["key"]: row["heldout_nll"] for row in rows}
    heads = ["held-out NLL", "gain kept", "uplink", "fewer than fp32", "bpp", "SNR", "cosine"]
    lines = []
    for row in rows:
        kept = (nll["base"] - row["heldout_nll"]) / (nll["base"] - nll["fedavg"])
        sent = row["uplink_bytes"]
        lines.append(
            [
                row["label"],
                f"{row['heldout_nll']:.4f}",
                "" if row["key"] == "base" else f"{100 * kept:.0f} %".replace("-0 %", "0 %"),
                f"{sent / 1e6:.3g} MB" if sent else "",
                f"{row['times_fewer']:.0f}x" if row["times_fewer"] else "",
                f"{row['bpp']:.3g}" if row["bpp"] else "",
                "" if row["snr_db"] is None else f"{row['snr_db']:.2f} dB",
                "" if row["cosine"] is None else f"{row['cosine']:.2f}",
            ]
        )
    return table_of(heads, lines, first="row")


def _accuracies(rows: list[dict[str, Any]], benchmark: str) -> str:
    """Per cent right by group, and the paired difference of the average to the base model's."""
    asked = [row for row in rows if benchmark in row["benchmarks"]]
    groups = [score["name"] for score in asked[0]["benchmarks"][benchmark]["groups"]]
    lines = []
    for row in asked:
        result = row["benchmarks"][benchmark]
        cells = [_accuracy(score) for score in result["groups"]]
        paired = [s for s in result["differences_to_base"] if s["name"].startswith("average")]
        letters = " ".join(f"{100 * share:.0f}" for share in result["choices"])
        difference = _accuracy(paired[0], "{:+.1f}") if paired else ""
        lines.append([row["label"], *cells, difference, letters])
    heads = [*groups, "average, against base", "answers A B C D, %"]
    return table_of(heads, lines, first=f"{BENCHMARKS[benchmark]}, % right")


def _privacy(results: dict[str, Any]) -> str:
    lines = []
    for cell in results["cells"]:
        before, after = (cell["curve"][at]["heldout_nll"] for at in (0, -1))
        bits = f"{cell['uplink']['bits_per_parameter']:.3g}"
        lines.append([f"`{cell['candidate']}`", f"{before:.3f}", f"{after:.3f}", bits])
    for cell in results["missing"]:
        lines.append(
            [f"`{cell['candidate']}`", "", f"stopped in round {cell['rounds_done'] + 1}", ""]
        )
    heads = ["held-out NLL before", "after 3 rounds", "bits per parameter"]
    return table_of(heads, lines, first="candidate")


def _accuracy(score: dict[str, Any], layout: str = "{:.1f}") -> str:
    text, error = layout.format(100 * score["value"]), score["standard_error"]
    return text if error is None else f"{text} ±{100 * error:.1f}"


if __name__ == "__main__":
    main()
