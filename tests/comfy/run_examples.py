"""The graphs of example_workflows in a real ComfyUI: `python tests/comfy/run_examples.py FOLDER [-k WORD]`.

FOLDER is ComfyUI's. Each runs with the embedded models, on the CPU, through the nodes as anybody's would; what its
video shows is judged as `turbowan evaluate` judges.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from real_cases import Cases, parser
from real_server import REPOSITORY, Server, python_of

sys.path.insert(0, str(REPOSITORY))

from real_files import write_picture
from real_seen import camera_seen, read_frames, shape_seen

EXAMPLES = REPOSITORY / "example_workflows" / "api"
SECONDS = 90
cases = Cases()


def run(server: Server, name: str) -> tuple[np.ndarray, str]:
    """The frames that an example saves, and what it took."""
    graph = json.loads((EXAMPLES / f"{name}.json").read_text())
    seconds, outputs = server.timed(graph)
    assert seconds <= SECONDS, f"{name} took {seconds:.0f} s, {SECONDS} at most"
    (saved,) = (each["videos"][0] for each in outputs.values() if "videos" in each)
    frames = read_frames(server.file(saved))
    assert frames.shape == (33, 160, 256, 3), frames.shape
    return frames, f"{seconds:.1f} s, host memory at most {server.peak_memory() / 2**30:.2f} GiB so far"


def shape(server: Server, name: str, *wanted: str) -> str:
    frames, took = run(server, name)
    seen = shape_seen(frames)
    assert tuple(seen.values()) == wanted, f"{name} shows {seen}, not {wanted}"
    return f"{' '.join(wanted)}, {took}"


def camera(server: Server, name: str, wanted: str) -> str:
    frames, took = run(server, name)
    seen = camera_seen(frames)
    assert seen == wanted, f"{name}: {seen}, not {wanted}"
    assert frames.std() > 10, f"{name}: hardly anything to see"
    return f"{seen}, {took}"


@cases
def text_to_video(server: Server) -> str:
    return shape(server, "text_to_video", "red", "circle", "right", "blue", "plain")


@cases
def image_to_video(server: Server) -> str:
    return camera(server, "image_to_video", "pan right")


@cases
def ksampler(server: Server) -> str:
    return shape(server, "ksampler", "yellow", "square", "up", "black", "plain")


@cases
def low_memory(server: Server) -> str:
    return camera(server, "low_memory", "pan left")


def main() -> int:
    args = parser(__doc__).parse_args()
    if args.folder is None:
        print("SKIPPED: no ComfyUI given; name its folder to run the examples in it")
        return 0
    with Server(args.folder, args.python or python_of(args.folder), args.flag) as server:
        write_picture(server.base / "input")
        return 1 if cases.run(server, server, only=args.k) else 0


if __name__ == "__main__":
    sys.exit(main())
