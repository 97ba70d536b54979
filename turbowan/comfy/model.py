"""MODEL: a ModelPatcher over ComfyUI's own kind of Wan model, with our transformer as its network."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.supported_models
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..checkpoints.detect import Detected
from ..checkpoints.load import choose_attention, load_transformer, read
from ..checkpoints.manifest import FILE_NAME, read_manifest
from ..errors import RequestError
from ..models.transformer import PATCH, Context, WanTransformer, settled
from ..sampling import rcm
from ..specs import FAMILIES, family_of
from .weights import PatchEmbedding, Patcher, adopt

log = logging.getLogger(__name__)

ATTENTION_OPTION = "turbowan_attention"  # in a patcher's transformer_options
PAIR = "turbowan_low_noise_model"  # a patcher's attachment: the other expert
_round_inputs = torch.compiler.disable(rcm.round_inputs)  # compilers leave out casts that cancel: the rounding itself
_REFUSED = ("time_dim_concat", "reference_latent", "vace_context", "camera_conditions", "audio_embed", "pose_latents")


class Network(WanTransformer):
    """Our transformer, called the way ComfyUI calls its own.

    rounds: whether latent and time are rounded as TurboDiffusion's sampler rounds them.
    """

    def __init__(self, net: WanTransformer, rounds: bool) -> None:
        with torch.device("meta"):
            super().__init__(net.config, net.attention, net.norms)
        for name, child in net.named_children():
            setattr(self, name, child)
        self.patch_embedding = PatchEmbedding(net.patch_embedding, PATCH)  # type: ignore[assignment]
        self.rounds = rounds
        self._options: dict[str, Any] = {}  # of the call that runs
        adopt(self, list(self.blocks), comfy.model_management.throw_exception_if_processing_interrupted)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x: [B, in_dim, T, h, w], the condition's channels after the latent's. timestep: [B], 0..1000.
        context: [B, L, D] text. clip_fea: [B, 257, 1280] image tokens."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        return WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute(  # type: ignore[no-any-return]
            x, timestep, context, clip_fea, time_dim_concat, options, **kwargs
        )

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None,
        time_dim_concat: Tensor | None,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        given = {"time_dim_concat": time_dim_concat, **kwargs}
        refused = [name for name in _REFUSED if given.get(name) is not None]
        if refused:
            raise RequestError(f"this MODEL does not take {', '.join(refused)}; load it with ComfyUI's own loader")
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, PATCH)
        channels = self.config.out_dim
        latent, condition = x[:, :channels], x[:, channels:] if x.shape[1] > channels else None
        if self.rounds:
            latent, timestep, condition = _round_inputs(latent, timestep, condition)
        self.attention = options.get(ATTENTION_OPTION, self.attention)
        text, rows = _without_tail(context)
        if self.config.image_dim is None:
            clip_fea = None
        self._options = options
        try:
            velocity = super().forward(latent, timestep, text, condition, clip_fea, rows)
        finally:
            self._options = {}  # it may hold whatever other nodes put there
        return velocity[..., :height, :width]

    def _embed_context(self, text: Tensor, image_tokens: Tensor | None, text_rows: int | None) -> Context:
        """As in ComfyUI, a model made for CLIP tokens runs without them, its image attention reading the text."""
        if image_tokens is not None or self.config.image_dim is None:
            return super()._embed_context(text, image_tokens, text_rows)
        embedded = self.text_embedding(text.to(self.dtype))
        repeats = max(0, (text_rows or 0) - text.shape[1])
        return Context(embedded, torch.cat([embedded, embedded[:, -1:].expand(-1, repeats, -1)], dim=1), 1 + repeats)

    def _run_blocks(
        self, x: Tensor, modulation: Tensor, rotation: tuple[Tensor, Tensor], context: Context
    ) -> Tensor:
        """Blocks that another node replaced (`patches_replace`) are called as ComfyUI calls them."""
        replaced = self._options.get("patches_replace", {}).get("dit", {})
        if not any(("double_block", i) in replaced for i in range(len(self.blocks))):
            return super()._run_blocks(x, modulation, rotation, context)
        x = self.patch_embedding(x.to(self.dtype))
        for i, block in enumerate(self.blocks):

            def original(args: dict[str, Any], block: Any = block) -> dict[str, Tensor]:
                told = replace(context, text=args["txt"])
                settings = (args["vec"], args["pe"], told, None, self.attention, self.norms)
                return {"img": settled(*block([args["img"], None, None], *settings))}

            args = {
                "img": x, "txt": context.text, "vec": modulation, "pe": rotation, "transformer_options": self._options,
            }  # fmt: skip
            patch = replaced.get(("double_block", i))
            x = (original(args) if patch is None else patch(args, {"original_block": original}))["img"]
        return x


def _without_tail(text: Tensor) -> tuple[Tensor, int]:
    """Text [B, L, D] without all but one of the zero rows at its end, and the count of rows it stands for."""
    used = text.ne(0).any(dim=2).any(dim=0).nonzero()
    last = int(used[-1]) + 1 if len(used) else 0
    return text[:, : last + 1], text.shape[1]


class WanModel(comfy.model_base.WAN21):
    """ComfyUI's Wan model: schedules, conditions and latent format are its own."""

    def __init__(self, net: Network, dtype: torch.dtype, source: str) -> None:
        config = net.config
        kind = comfy.supported_models.WAN21_T2V if config.image_dim is None else comfy.supported_models.WAN21_I2V
        settings = {
            "image_model": "wan2.1", "model_type": "t2v" if config.image_dim is None else "i2v",
            "dim": config.dim, "in_dim": config.in_dim, "out_dim": config.out_dim, "num_layers": config.num_layers,
            "disable_unet_model_creation": True, "dtype": dtype,
        }  # fmt: skip
        super().__init__(kind(settings), image_to_video=config.image_dim is not None)
        self.diffusion_model = net.eval()
        self.source = source  # the file's name


_loaded: WeakValueDictionary[tuple, Patcher] = WeakValueDictionary()


def load_model(path: Path, attention: str, sla_topk: float, offload_mode: str) -> Patcher:
    """The MODEL of a file. Two loaders of one file share its weights on the host as long as one of them is in use.

    Raises:
        CheckpointError: the file cannot serve, or lacks SLA's projection where SLA is asked for.
    """
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    if offload_mode == "cpu_only":
        device = offload = torch.device("cpu")
    dtype = _dtype(device)
    status = path.stat()
    key = (str(path), status.st_mtime_ns, status.st_size, dtype, offload_mode)
    whole = _loaded.get(key)
    if whole is None:
        net = load_transformer(path, "cpu", dtype)
        rounds = _rounds(path, read(path, "transformer")[1], net)
        model = WanModel(Network(net, rounds), dtype, path.name)
        log.info("turbowan: %s", describe(path, model))
        whole = _loaded[key] = Patcher(model, load_device=device, offload_device=offload)
        whole.host_only = offload_mode == "layerwise_gpu"
    patcher = whole.clone()  # clones know of each other, so that ComfyUI loads their weights once
    how = choose_attention(whole.model.diffusion_model.config, str(path), attention, sla_topk)
    patcher.model_options["transformer_options"][ATTENTION_OPTION] = how
    return patcher


def _dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32


def _rounds(path: Path, found: Detected, net: WanTransformer) -> bool:
    """Whether a file holds weights for TurboDiffusion's sampler: by the manifest beside it, else by its tensors."""
    if (path.parent / FILE_NAME).exists():
        manifest = read_manifest(path.parent)
        if path in manifest.files.values():
            return manifest.sampler == "rcm"
    config = net.config
    two = "high" in path.stem.lower() or "low" in path.stem.lower()
    return FAMILIES[family_of(found.family, config.has_sla, two, config.in_dim > config.out_dim)].sampler == "rcm"


def describe(path: Path, model: WanModel) -> str:
    """One line for the log."""
    config = model.diffusion_model.config
    kind = "image-to-video" if config.in_dim > config.out_dim else "text-to-video"
    size = sum(p.nbytes for p in model.parameters())
    return f"{path.name}: {kind}, width {config.dim}, {config.num_layers} blocks, {size / 2**30:.2f} GiB of weights"
