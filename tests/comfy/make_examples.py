"""Writes the graphs of example_workflows as the editor saves them, from those in the API's form beside them in `api`:
`python tests/comfy/make_examples.py FOLDER [--browser CHROMIUM]`. FOLDER is ComfyUI's.

Each is laid out, run with the embedded models, and shown: its preview and a screenshot for docs/comfyui.md.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image
from real_cases import parser
from real_server import REPOSITORY, Server, python_of

sys.path.insert(0, str(REPOSITORY))

from real_files import write_picture
from real_page import Page
from real_seen import read_frames

EXAMPLES = REPOSITORY / "example_workflows"
PICTURES = REPOSITORY / "docs" / "images"

# name: columns of nodes from left to right, and what is said beside them
LAYOUTS: dict[str, tuple[list[list[int]], str]] = {
    "text_to_video": (
        [[1, 2, 3], [4], [5], [6, 7]],
        "**Text to video in four steps.** Runs as it is, with the models inside the package, on any CPU.\n\n"
        "With Wan 2.1: choose `TurboWan2.1-T2V-1.3B-480P.pth` (or 14B, or a `-quant` file), an umT5-xxl text encoder"
        " and the Wan 2.1 VAE in the three loaders, set `sla_topk` to 0.1, and the size to 832 x 480, 81 frames.",
    ),
    "image_to_video": (
        [[1, 2, 3, 4], [5, 6], [7], [8]],
        "**Image to video with both experts of Wan 2.2.** Runs as it is; the embedded models move a camera over any"
        " picture.\n\nWith Wan 2.2: choose `TurboWan2.2-I2V-A14B-high-720P-quant.pth` and `…-low-…`, an umT5-xxl text"
        " encoder and the Wan 2.1 VAE, set `sla_topk` to 0.1, `resolution` to 480p or 720p, and 81 frames.",
    ),
    "ksampler": (
        [[1, 2, 3], [4, 5], [6, 7], [8], [9, 10]],
        "**ComfyUI's own KSampler.** The MODEL, CLIP and VAE are ComfyUI's own types: patches, LoRAs and samplers of"
        " other nodes apply.\n\n`lcm`, 4 steps and cfg 1 suit distilled models; for TurboDiffusion's exact steps use"
        " SamplerCustom with TurboWan Sigmas. Undistilled models: `uni_pc`, 20 steps or more, cfg 3 to 5.",
    ),
    "low_memory": (
        [[1, 2, 3], [4, 6], [5], [7], [8]],
        "**For small cards.** `layerwise_gpu` leaves the weights in host memory: each block borrows the card for its"
        " turn. Text encoder and VAE are loaded by the node that needs them, frames are decoded in tiles.\n\n"
        "With Wan 2.2: the `-quant` files of both experts, `sla_topk` 0.1, 832 x 480, 81 frames. Both experts lie in"
        " host memory then, 27 GiB.",
    ),
}

ARRANGE = """([columns, note]) => {
    const [gap, top] = [40, 190];
    let x = 0;
    let below = 0;
    for (const column of columns) {
        let y = top;
        let width = 0;
        for (const id of column) {
            const node = app.graph.getNodeById(id);
            const [w, h] = node.computeSize();
            const text = node.widgets?.some((widget) => widget.type === "customtext");
            const picture = node.type === "LoadImage" || node.type.endsWith("SaveVideo");
            node.setSize([Math.max(w, 300), picture ? Math.max(h, 390) : text ? Math.max(h, 150) : h]);
            node.pos = [x, y];
            y += node.size[1] + gap + 30;
            width = Math.max(width, node.size[0]);
        }
        below = Math.max(below, y);
        x += width + gap;
    }
    const said = LiteGraph.createNode("MarkdownNote");
    app.graph.add(said);
    said.widgets[0].value = note;
    said.title = "About this graph";
    said.pos = [0, 0];
    said.setSize([x - gap, 100]);
    for (const node of app.graph._nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === "control_after_generate") widget.value = "fixed";
    app.canvas.ds.fitToBounds([-20, -50, x + 20, Math.max(below, 840)], { zoom: 0.96 });
    app.graph.setDirtyCanvas(true, true);
}"""


def make(page: Page, name: str) -> str:
    """Write the graph, its preview and a screenshot of it after a run; a line about it."""
    page.load_api(json.loads((EXAMPLES / "api" / f"{name}.json").read_text()), name)
    columns, note = LAYOUTS[name]
    page.page.evaluate(ARRANGE, [columns, note])
    page.page.wait_for_timeout(500)
    graph = page.graph()
    graph["extra"] = {"ds": graph["extra"]["ds"]}
    (EXAMPLES / f"{name}.json").write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n")
    page.load(graph, name)
    page.dismiss()
    seconds, outputs = page.run()
    frames = read_frames(page.server.file(next(each["videos"][0] for each in outputs.values() if "videos" in each)))
    preview = Image.fromarray(frames[len(frames) // 2]).resize((512, 320), Image.Resampling.LANCZOS)
    preview.save(EXAMPLES / f"{name}.jpg", quality=85)
    shot = PICTURES / f"comfyui-{name.replace('_', '-')}.jpg"
    page.page.wait_for_timeout(2000)
    picture = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    picture.resize((1280, 720), Image.Resampling.LANCZOS).save(shot, quality=60, optimize=True)
    return f"{name}: ran in {seconds:.1f} s; screenshot of {shot.stat().st_size / 1000:.0f} kB"


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--browser", type=Path, default=shutil.which("chromium"), help="Chromium's binary")
    args = options.parse_args()
    with Server(args.folder.resolve(), args.python or python_of(args.folder)) as server:
        write_picture(server.base / "input")
        for name in (each for each in LAYOUTS if args.k in each):
            with Page(server, args.browser) as page:  # a page of its own: previews are kept by nodes' numbers
                print(make(page, name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
