"""Compare the curves of two_gpus.sh: the largest relative difference of a loss from the one-GPU run's."""

import json
import sys
from pathlib import Path

LOSSES = ("consistency", "score", "critic")


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def main() -> None:
    out = Path(sys.argv[1])
    one = curve(out / "one")
    for name, reference in (("two", "one"), ("killed", "two")):
        lines = curve(out / name)
        wanted = curve(out / reference)
        assert [line["step"] for line in lines] == [line["step"] for line in wanted]
        apart = {
            loss: max(abs(a[loss] / b[loss] - 1) for a, b in zip(lines, wanted, strict=True) if loss in b)
            for loss in LOSSES
        }
        last = {loss: lines[-1][loss] / wanted[-1][loss] - 1 for loss in LOSSES if loss in wanted[-1]}
        print(json.dumps({"run": name, "against": reference, "largest": apart, "last": last}))
    print(json.dumps({"steps": one[-1]["step"], "seconds": {n: curve(out / n)[-1]["seconds"] for n in ("one", "two")}}))


if __name__ == "__main__":
    main()
