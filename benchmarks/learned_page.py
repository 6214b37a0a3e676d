"""Put the numbers of benchmarks/results/learned into docs/learned-codec.md and README.md.

    python benchmarks/learned_page.py
    python benchmarks/learned_page.py --check

Blocks are marked as in docs/codecs.md.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from codec_pages import BLOCK, ROOT, Row, csv_file, fill, percent, plus_minus, result_file, table_of

PAGE = ROOT / "docs" / "learned-codec.md"
FACE = ROOT / "README.md"
MIB = 2**20
CLOSED_LOOPS = {
    "MedQuAD": "learned/medquad.json",
    "Dolly": "learned/dolly.json",
    "Dolly at 1/200": "learned/dolly_200.json",
    "forty clients": "learned/forty_clients.json",
    "ablation at 1/1000": "learned/ablation_0.032.json",
    "ablation at 1/500": "learned/ablation_0.064.json",
}
OPEN_LOOP = ("`learned`", "own state", "others' states", "best other codec")


def main() -> None:
    for page in (PAGE, FACE):
        fill(page, filled, __doc__)


def filled(page: str) -> str:
    """The page with every block written anew."""
    return BLOCK.sub(lambda m: m[1] + _block(m[2]) + m[3], page)


def _block(name: str) -> str:
    if name == "TGAP":
        return _directions(result_file("learned/directions.json")["results"])
    if name == "open loop":
        return _open_loop(csv_file("learned/open_loop/codecs.csv"))
    if name == "speed":
        return _speed(result_file("learned/speed.json")["results"])
    if name == "flagship":
        return _headline(result_file(CLOSED_LOOPS["MedQuAD"]))
    return _closed_loop(result_file(CLOSED_LOOPS[name]))


def _open_loop(measured: list[Row]) -> str:
    """Four rows a recording: `learned` without a state, with its own, with others'; the rival."""
    measured = [row for row in measured if row["asked_bpp"]]
    rates = sorted({float(row["asked_bpp"]) for row in measured})
    rows = []
    for recording in dict.fromkeys(row["recording"] for row in measured):
        cells: dict[str, list[str]] = {name: [] for name in OPEN_LOOP}
        for rate in rates:
            found = [
                row
                for row in measured
                if row["recording"] == recording and float(row["asked_bpp"]) == rate
            ]
            own: dict[str, float] = {}
            best, rival = max(
                (float(row["snr_db"]), row["codec"]) for row in found if row["codec"] != "learned"
            )
            for row in found:
                if row["codec"] == "learned":
                    state = json.loads(row["options"]).get("state", "").removesuffix("-tgap")
                    own[state] = float(row["snr_db"])
            others = [snr for state, snr in own.items() if state not in ("", recording)]
            told = (
                f"{own['']:.2f}",
                f"{own[recording]:.2f}",
                f"{min(others):.2f} to {max(others):.2f}",
                f"{best:.2f} (`{rival}`)",
            )
            for name, text in zip(OPEN_LOOP, told, strict=True):
                cells[name].append(text)
        rows += [[f"{recording}: {name}", *texts] for name, texts in cells.items()]
    return table_of([f"{rate:g} bpp" for rate in rates], rows, first="updates, codec")


def _speed(results: list[dict[str, Any]]) -> str:
    """A row a model and rate: what a client does in a round, and the server."""
    rows = [
        [
            f"{row['model']}, {row['parameters'] / 1e6:.3g} M",
            row["trained"],
            f"{row['bpp']:g}",
            *(f"{row[f'{key}_ms']['median']:.0f} ms" for key in ("axes", "encode", "decode")),
            f"{row['encode_peak']:.1f}x / {row['decode_peak']:.1f}x",
            f"{row['state_bytes'] / MIB:.1f} MiB",
        ]
        for row in results
    ]
    heads = ["trained", "bpp", "axes, once a round", "encode", "decode", "memory", "state"]
    return table_of(heads, rows, first="adapter")


def _headline(results: dict[str, Any]) -> str:
    """The closed loop in short."""
    rows = [[f"`{row['candidate']}`", *_bytes_and_loss(row)] for row in _measured(results)]
    return table_of(["uplink, MiB", "fewer", "held-out NLL", "gain kept"], rows, first="uplink")


def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results["summary"] if row["final_nll"]["n"]]


def _bytes_and_loss(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['uplink_bytes']['mean'] / MIB:.3g}",
        f"{row['times_fewer_than_fp32']['mean']:,.0f}x",
        plus_minus(row["final_nll"], "{:.4f}"),
        percent(row["gain_kept"]),
    ]


def _directions(results: dict[str, Any]) -> str:
    """A row a codec file: what it cost, and the energy along its directions."""
    kinds = list(next(iter(results.values()))["energy"])
    rows = [
        [
            label,
            f"{found['tgap_uplink_bytes'] / MIB:.3g}",
            f"{found['state_bytes'] / MIB:.2f}",
            *(f"{found['energy'][kind]:.2f}" for kind in kinds),
        ]
        for label, found in results.items()
    ]
    return table_of(["uplink, MiB", "state, MiB", *kinds], rows, first="learned from")


def _closed_loop(results: dict[str, Any]) -> str:
    """A row a candidate: bytes, loss, and bytes to where the reference ends, or nearly."""
    chosen = results["tuning"]["candidates"] if results["tuning"] else {}
    shares = {
        cell["candidate"]: cell["seconds"]["encode_share_of_train"] for cell in results["cells"]
    }
    rows = [
        [
            f"`{row['candidate']}`",
            *_bytes_and_loss(row),
            *(_reached(row["bytes_to_share"]["uplink"][share]) for share in ("0.95", "0.99")),
            f"{100 * shares[row['candidate']]:.1f} %",
            *(f"{rate:g}" for rate in chosen.get(row["candidate"], {}).get("chosen", {}).values()),
            str(row["final_nll"]["n"]),
        ]
        for row in _measured(results)
    ]
    heads = ["uplink, MiB", "fewer", "held-out NLL", "gain kept", "MiB to 95 %", "MiB to 99 %"]
    tuned = [key.rsplit(".", 1)[-1] for key in (results["tuning"] or {"grid": {}})["grid"]]
    return table_of([*heads, "encoding / training", *tuned, "seeds"], rows, first="uplink")


def _reached(share: dict[str, Any]) -> str:
    reached = [bytes_ for bytes_ in share["by_seed"].values() if bytes_ is not None]
    if not reached:
        return "-"
    some = "" if len(reached) == share["of"] else f" ({len(reached)} of {share['of']} seeds)"
    return f"{statistics.fmean(reached) / MIB:.3g}{some}"


if __name__ == "__main__":
    main()
