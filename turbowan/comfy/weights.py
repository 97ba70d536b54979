"""Our layers as ComfyUI's memory manager and its LoRA loader want to see them.

ComfyUI counts parameters (not buffers), leaves layers on the host that say `comfy_cast_weights`, and patches weights by
their names in the state dict. Layers in 8 bits are not patched in place, which would round small changes away: they
get what the adapters add as a branch of its own, in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
import torch.nn.functional as F
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ..memory.lending import Lender, pin
from ..models.linear import EightBitLinear, Int8BlockLinear, ScaledLinear
from ..models.pack import full_weight
from ..ops.int8_blockwise import BLOCK

EIGHT_BITS = (EightBitLinear, ScaledLinear)


class PatchEmbedding(nn.Module):
    """The patch embedding with the shape that other programs know: a convolution's [D, C, 1, 2, 2]."""

    def __init__(self, linear: nn.Linear, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = _parameter(linear.weight.unflatten(1, (-1, *patch)))
        self.bias = _parameter(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class BlockLinear(Int8BlockLinear):
    """int8 with 128 x 128 scales, its codes under the name `weight`."""

    def __init__(self, layer: Int8BlockLinear) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale, self.bias = map(_parameter, (layer.int8_weight, layer.scale, layer.bias))

    @property
    def int8_weight(self) -> Tensor:  # type: ignore[override]
        return self.weight


class Codec:
    """A layer's 8-bit weight to numbers and back, for what else of ComfyUI merges weights. Scales stay as they are."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = ref(layer)

    def convert_weight(self, codes: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """Codes, in any dtype, to the weight [N, K] in float32."""
        return codes.float() * self._scales(codes)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, return_weight: bool = False, **_: Any
    ) -> Tensor | None:
        """Round a weight to the layer's codes, and keep them or give them back."""
        layer: Any = self._layer()
        codes = weight.float() / self._scales(weight)
        if layer.weight.dtype == torch.int8:
            codes = codes.round().clamp(-128, 127)
        codes = codes.to(layer.weight.dtype)
        if return_weight:
            return codes
        if inplace_update:
            layer.weight.copy_(codes)
        else:
            layer.weight = _parameter(codes)
        return None

    def _scales(self, like: Tensor) -> Tensor:
        """float32, of `like`'s shape or one that stretches to it."""
        layer: Any = self._layer()
        if isinstance(layer, Int8BlockLinear):
            rows, columns = like.shape
            scale = layer.scale.to(like.device).repeat_interleave(BLOCK, 0)[:rows]
            return scale.repeat_interleave(BLOCK, 1)[:, :columns]
        scale = layer.scale_weight if isinstance(layer, ScaledLinear) else layer.weight_scale
        return scale.to(like.device).float().view(-1, 1)


def adopt(net: nn.Module, blocks: Sequence[nn.Module], between: Callable[[], None]) -> None:
    """Make a network's weights visible to ComfyUI, in place.

    Args:
        blocks: in the order they run; weights on the host are lent to the device for one of them at a time.
        between: called before each block.
    """
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Int8BlockLinear):
                setattr(module, name, BlockLinear(child))
    layer: Any
    for layer in net.modules():
        if isinstance(layer, EIGHT_BITS):
            for name, value in list(layer._buffers.items()):
                del layer._buffers[name]
                layer.register_parameter(name, None if value is None else _parameter(value))
            codec: Any = Codec(layer)
            layer.convert_weight, layer.set_weight = codec.convert_weight, codec.set_weight
        if layer._parameters and not any(layer.children()):
            layer.comfy_cast_weights = False
            layer.weight_function, layer.bias_function = [], []
    Lender([net, *blocks], _patched, _is_patched, between)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


def _functions(module: nn.Module, name: str) -> list[Callable[[Tensor], Tensor]]:
    if isinstance(module, EIGHT_BITS) and name == "weight":
        return []
    return getattr(module, f"{name}_function", []) if name in ("weight", "bias") else []


def _is_patched(module: nn.Module) -> bool:
    return bool(_functions(module, "weight") or _functions(module, "bias"))


def _patched(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    for function in _functions(module, name):
        weight = function(weight)
    return weight


class Patcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that knows layers in 8 bits, and weights that belong to no layer.

    host_only: weights never move to the device as a whole; each block borrows them (`layerwise_gpu`).
    """

    host_only = False

    def clone(self) -> Patcher:
        copy: Patcher = super().clone()
        copy.host_only = self.host_only
        return copy

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        if self.host_only:
            if torch.device(device_to).type == "cuda":
                pin(self.model)
            lowvram_model_memory, full_load = 0.1, False
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
        module: Any
        for name, module in self.model.named_modules():
            if isinstance(module, EIGHT_BITS):
                module.addition = addition(self.patches.get(f"{name}.weight", []), module, f"{name}.weight")
                module.weight_function = []  # type: ignore[assignment]
            elif any(module.children()):  # ComfyUI passes over weights beside layers; ours are small
                for key in (f"{name}.{own}" for own in module._parameters):
                    if key not in self.backup:
                        self.patch_weight_to_device(key, device_to)

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
        module = self.model.get_submodule(key.rpartition(".")[0])
        if not (isinstance(module, EIGHT_BITS) and key.endswith(".weight")):
            super().patch_weight_to_device(key, device_to, inplace_update)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for module in self.model.modules():
                if isinstance(module, EIGHT_BITS):
                    module.addition = None


def addition(patches: Sequence[tuple], layer: nn.Module, key: str) -> Callable[[Tensor], Tensor] | None:
    """What ComfyUI's patches of a layer's weight add to its result; None where there is nothing.

    Args:
        patches: (strength, adapter, strength of the model's own weight, offset, function) each, as `add_patches` keeps
            them. Plain LoRAs are joined along their rank, so that any number costs two products; of whatever else there
            is, the whole change of the weight is kept.
    """
    if not patches:
        return None
    pairs = [_low_rank(patch) for patch in patches]
    if all(pair is not None for pair in pairs):
        return LowRank([pair for pair in pairs if pair is not None])
    weight = full_weight(layer).float()
    changed = comfy.lora.calculate_weight(list(patches), weight.clone(), key)
    return Change(changed - weight)


def _low_rank(patch: tuple) -> tuple[Tensor, Tensor] | None:
    """(down [R, K], up [N, R]) of a plain LoRA, its strength in the second; None for other kinds."""
    strength, adapter, own_strength, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or own_strength != 1.0 or offset is not None or function is not None:
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if middle is not None or dora_scale is not None or reshape is not None:
        return None
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return down.flatten(1).float(), up.flatten(1).float() * scale


class LowRank:
    """x -> (x down^T) up^T, all adapters of a layer at once."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._matrices = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        self._matrices = down, up = self._matrices[0].to(x), self._matrices[1].to(x)
        return F.linear(F.linear(x, down), up)


class Change:
    """x -> x change^T, for a change [N, K] of any rank."""

    def __init__(self, change: Tensor) -> None:
        self._change = change

    def __call__(self, x: Tensor) -> Tensor:
        self._change = self._change.to(x)
        return F.linear(x, self._change)
