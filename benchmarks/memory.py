"""Whole generations within budgets of a GPU's memory: random weights of true size, judged by the device's own figure.

    python benchmarks/memory.py --folder scratch > memory.jsonl                    # all of CASES; 60 GB of disk
    python benchmarks/memory.py --folder scratch --case "A14B-I2V 720p" --budget 24GB

One JSON line a run, as of `turbowan bench pipeline`, with the budget, the plan and its peak. "whole" is without one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbowan import Engine, GenerateRequest
from turbowan.bench import presets
from turbowan.bench.pipeline import Trial, run_pipeline
from turbowan.bench.pipeline_process import made_picture
from turbowan.errors import TurbowanError

CASES = {  # preset, resolution, precision, budgets
    "A14B-I2V 720p": ("A14B-I2V-720p", "720p", "int8", ("whole", "24GB", "16GB", "12GB")),
    "A14B-I2V 480p": ("A14B-I2V-720p", "480p", "int8", ("whole", "16GB", "12GB")),
    "1.3B 480p": ("1.3B-480p", "480p", "bf16", ("whole", "6GB")),
}


def run(
    case: str, budget: str, folder: Path, text: str, layers: int | None, warm: int, device: str
) -> Iterator[dict[str, Any]]:
    """Records of one process: the first generation cold, the median of the others warm."""
    name, resolution, precision, _ = CASES[case]
    preset = presets.find_preset(name, None, text)
    manifest, home = presets.write_model(folder, preset, text, layers, device)
    request: dict[str, Any] = {
        "prompt": presets.PROMPT, "resolution": resolution, "precision": precision, "attention": "sla",
        "num_frames": 81, "gpu_budget": None if budget == "whole" else budget,
    }  # fmt: skip
    size = presets.frame_size(GenerateRequest(**request))
    image = size if preset.experts else None
    facts: dict[str, Any] = {"case": f"{case} {budget}", "budget": budget, "text_encoder": text, "layers": layers}
    try:
        picture = None if image is None else made_picture(*image)
        plan = Engine.load(home, device=device).plan(GenerateRequest(**request, image=picture))
        facts |= {"plan": plan.as_dict(), "planned_gb": round(plan.peak / 1e9, 2)}
    except TurbowanError as error:
        yield {"bench": "memory", **facts, "refused": str(error)}
        return
    for record in run_pipeline(Trial(manifest, home, request, device, image, warm, first_ever=False)):
        yield {**record, "bench": "memory", **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/bench"), help="where the weights are, or will be")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--budget", action="append", help="such as 12GB, or whole")
    parser.add_argument("--text-encoder", choices=presets.TEXT_FORMATS, default="fp8", help="its file's format")
    parser.add_argument("--layers", type=int, help="fewer than the true number, for a trial")
    parser.add_argument("--warm", type=int, default=2, help="generations after the first")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    for case in args.case or CASES:
        for budget in args.budget or CASES[case][3]:
            for record in run(case, budget, args.folder, args.text_encoder, args.layers, args.warm, args.device):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
