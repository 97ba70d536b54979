"""Compare the curves of two_gpus.sh: the largest relative difference of each loss, of two GPUs from one, and of a run
killed half-way and resumed from the unbroken one. A run that was cut short is compared as far as it went: `steps` says
how far, and how far the other went."""

import json
import sys
from pathlib import Path

from turbowan.train import curve

LOSSES = ("consistency", "score", "critic")


def main() -> None:
    out = Path(sys.argv[1])
    runs = {name: curve.read(out / name / curve.CURVE_FILE) for name in ("one", "two", "killed")}
    for name, reference in (("two", "one"), ("killed", "two")):
        pairs = list(zip(runs[name], runs[reference], strict=False))
        if not pairs or any(ours["step"] != theirs["step"] for ours, theirs in pairs):
            sys.exit(f"{out / name} and {out / reference} have no curves of the same steps; see the logs beside them")
        apart = [
            {loss: abs(ours[loss] / theirs[loss] - 1) for loss in LOSSES if loss in theirs} for ours, theirs in pairs
        ]
        line = {
            "run": name,
            "against": reference,
            "steps": [pairs[-1][0]["step"], runs[reference][-1]["step"]],
            "largest": {loss: max(found.get(loss, 0.0) for found in apart) for loss in LOSSES},
            "last": apart[-1],
            "seconds": [run[len(pairs) - 1]["seconds"] for run in (runs[name], runs[reference])],
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
