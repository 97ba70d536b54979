"""Inside ComfyUI's Python: `partial_load.py COMFY MODEL LORA [cpu|cuda]` loads a MODEL whole, in part and not at
all, and prints as JSON what its memory manager saw and how far apart the results are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from weakref import ref

comfy_folder, path, lora_path, *device = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path[:0] = [comfy_folder, str(Path(__file__).parent.parent.parent)]

from comfy.cli_args import args

args.cpu = device != ["cuda"]

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
import torch.nn.functional as F
from torch import nn

from turbowan.comfy.model import load_model
from turbowan.models.pack import full_weight

CPU, DEVICE = torch.device("cpu"), comfy.model_management.get_torch_device()
torch.manual_seed(torch.seed())


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def change_of(lora: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a file of `random_lora` adds to a layer's weight."""
    down, up = (f"diffusion_model.{name}.lora_{each}.weight" for each in "AB")
    if down in lora:
        return lora[up] @ lora[down]
    flat = f"lora_unet_{name.replace('.', '_')}"
    down, up = (lora[f"{flat}.lora_{each}.weight"] for each in ("down", "up"))
    return up @ down * lora[f"{flat}.alpha"] / len(down)


def off_by(net: nn.Module, given: tuple, lora: dict[str, torch.Tensor], strength: float) -> float:
    """How far a layer in 8 bits with a LoRA is from the same layer without it plus the change, at most."""
    errors = [0.0]

    def compare(name: str, layer: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        added, layer.addition = layer.addition, None
        change = F.linear(x.float(), strength * change_of(lora, name).to(x.device))
        wanted = layer.forward(x).float() + change.to(x.dtype).float()
        layer.addition = added
        errors.append(apart(out.float(), wanted))

    hooks = [
        layer.register_forward_hook(lambda layer, x, out, name=name: compare(name, layer, *x, out))
        for name, layer in net.named_modules()
        if getattr(layer, "addition", None) is not None
    ]
    net(*given)
    for hook in hooks:
        hook.remove()
    return max(errors)


@torch.inference_mode()
def main() -> dict[str, object]:
    model = load_model(Path(path), "original", 0.1, "comfy_native")
    net = model.model.diffusion_model
    config = net.config
    noise = (torch.randn(1, config.in_dim, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 20, config.text_dim))
    given = tuple(each.to(DEVICE) for each in noise)

    def whole(patcher: object) -> torch.Tensor:
        patcher.detach()
        comfy.model_management.load_models_gpu([patcher])
        return net(*given)

    def in_part(patcher: object, memory: float) -> torch.Tensor:
        patcher.detach()
        patcher.load(DEVICE, lowvram_model_memory=memory)
        return net(*given)

    found: dict[str, object] = {
        "size": model.model_size(),
        "bytes": sum(t.nbytes for t in (*net.parameters(), *net.buffers())),
        "buffers": sum(1 for _ in net.buffers()),
    }
    base = whole(model)
    found["in_part"] = apart(in_part(model, model.model_size() / 2), base)
    found["left_behind"] = model.model_size() - model.loaded_size()
    found["cast"] = sum(bool(getattr(m, "comfy_cast_weights", False)) for m in net.modules())
    lora = comfy.utils.load_torch_file(lora_path)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)
    with_lora = whole(patched)
    found["lora"] = apart(with_lora, base)
    found["lora_layers"] = off_by(net, given, lora, 0.7)
    found["lora_in_part"] = max(apart(in_part(patched, memory), with_lora) for memory in (1.0, model.model_size() / 2))
    freed = patched.partially_unload(CPU, model.model_size())
    found["lora_after_unload"] = apart(net(*given), with_lora)
    found["freed"] = freed
    found["after"] = apart(whole(model), base)
    codecs = [(m.weight, m.convert_weight, m.set_weight) for m in net.modules() if hasattr(m, "convert_weight")]
    found["codecs"] = all(torch.equal(back(to(w.float()), return_weight=True), w) for w, to, back in codecs)
    found["converted"] = max(
        (apart(m.convert_weight(m.weight), full_weight(m)) for m in net.modules() if hasattr(m, "convert_weight")),
        default=0.0,
    )
    comfy.model_management.vram_state = comfy.model_management.VRAMState.NO_VRAM
    comfy.model_management.is_device_cpu = lambda device: False  # or nothing would stay behind
    for name, patcher in (("novram", model), ("novram_lora", patched)):
        patcher.detach()
        comfy.model_management.load_models_gpu([patcher])
        found[f"{name}_loaded"] = patcher.loaded_size()
        found[name] = apart(net(*given), with_lora if name == "novram_lora" else base)
    gone = ref(load_model(Path(path), "original", 0.1, "cpu_only").model.diffusion_model)
    found["freed_at_once"] = gone() is None
    kept = load_model(Path(path), "original", 0.1, "layerwise_gpu")
    comfy.model_management.load_models_gpu([kept])
    found["layerwise"] = apart(kept.model.diffusion_model(*given), base)
    found["layerwise_clone"] = kept.clone().host_only
    found["layerwise_loaded"] = kept.loaded_size()
    found["shared"] = load_model(Path(path), "original", 0.5, "comfy_native").model is model.model
    return found


print(json.dumps(main()))
