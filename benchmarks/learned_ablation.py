"""What each part of `learned` is worth: closed loop, one thing at a time.

    cgfedllm pretrain learned configs/flagship-medquad.toml
    python benchmarks/learned_ablation.py
    python benchmarks/learned_ablation.py --bpp 0.064

`configs/flagship-medquad.toml` in fifteen rounds, all at the server rate that its comparison chose
for `raw`. `elsewhere` is the state from GSM8K of `learned_directions.py`, which begins with its
commands. What no option turns off is turned off here, in the codec's own constants. Runs that are
complete are read, not run again.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import RESULTS

from cgfedllm import api, load_config
from cgfedllm.codecs.learned import axes
from cgfedllm.codecs.learned.codec import Learned

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "flagship-medquad.toml"
ROUNDS = 15
SERVER_LR = 9
LEARNED = f"uplink.name=learned,uplink.options.bpp={{bpp}},federation.server_lr={SERVER_LR}"
STATE = "uplink.state={state}"
ALL = f"{LEARNED},{STATE},training.subspace=A"

# label: settings; the first is what the others are compared with
ROWS = {
    "all of it": ALL,
    "TGAP elsewhere": f"{LEARNED},uplink.state={{elsewhere}},training.subspace=A",
    "no TGAP": LEARNED,
    "no FAF": f"{ALL},uplink.options.grown=false",
    "no directions": f"{LEARNED},uplink.options.grown=false",
    "no weights": f"{ALL},uplink.options.metric=parameters",
    "no error feedback": f"{ALL},uplink.error_feedback=false",
    "training everywhere": f"{LEARNED},{STATE}",
    "no entropy model": ALL,
    "pieces instead of rows": ALL,
}
# label: constants of the codec that it runs with
CONSTANTS: dict[str, list[tuple[Any, str, float]]] = {
    "no entropy model": [(axes, "CLASSES", 1), (axes, "KNOWN_CLASSES", 1)],
    "pieces instead of rows": [(Learned, "pieces_from", 0.0)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0", help="as of cgfedllm compare")
    parser.add_argument("--bpp", type=float, default=0.032, help="uplink.options.bpp of all")
    parser.add_argument("--rows", default="", help="labels, the first of all of it; all of them")
    parser.add_argument("--state", default="runs/flagship-medquad-tgap/codec.safetensors")
    parser.add_argument("--elsewhere", default="runs/elsewhere-tgap/codec.safetensors")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    settings = [f"name=ablation-{given.bpp:g}", f"federation.rounds={ROUNDS}", "evaluation.every=5"]
    config = load_config(CONFIG, settings)

    variants = []
    for label in given.rows.split(",") if given.rows else ROWS:
        text = ROWS[label].format(bpp=given.bpp, state=given.state, elsewhere=given.elsewhere)
        variants.append(f"{label}:{text}")
        with ExitStack() as patches:
            for where, name, value in CONSTANTS.get(label, []):
                patches.enter_context(patch.object(where, name, value))
            api.compare(config, [], seeds, variants=variants[-1:])
    # all are complete: they are read, not run
    to = RESULTS / "learned" / f"ablation_{given.bpp:g}.json"
    print(api.compare(config, [], seeds, variants=variants, results=to).results)


if __name__ == "__main__":
    main()
