"""What stages hold at most, found without a device: the real networks of true size run on PyTorch's meta device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from turbowan.checkpoints.load import on_meta
from turbowan.media.transfer import IN_FLIGHT
from turbowan.memory.activations import (
    WORKSPACE,
    Coder,
    Work,
    decode_bytes,
    decode_grid,
    denoise_bytes,
    encode_bytes,
)
from turbowan.memory.catalog import COMMON
from turbowan.models import transformer, vae_fused
from turbowan.models.pack import join_qkv, prepare_block
from turbowan.models.transformer import AttentionConfig, WanTransformer
from turbowan.models.vae import WanVAE
from turbowan.sampling import rcm
from turbowan.stages import to_uint8


class Live(TorchDispatchMode):
    """Counts what operations make on the meta device for as long as anything refers to it; `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for key, (storage, size) in list(self._storages.items()):
            if storage.expired():
                self._now -= size
                del self._storages[key]
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for made in _storages(result):
            if made._cdata not in given and made._cdata not in self._storages:
                self._storages[made._cdata] = StorageWeakRef(made), made.nbytes()
                self._now += made.nbytes()
        self.most = max(self.most, self._now)
        return result


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_iter(values) if isinstance(x, Tensor) and x.is_meta)


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for a device's kind is answered for it, and what makes tables there makes them on the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(vae_fused, "serves", lambda *_: True)
    fused = {name: getattr(F, name) for name in ("pad", "linear", "conv2d")}  # plain PyTorch would hold the scores
    fused["scaled_dot_product_attention"] = lambda q, *_: torch.empty_like(q)
    monkeypatch.setattr(vae_fused, "F", SimpleNamespace(**fused))

    def rope_table(frames: int, height: int, width: int, size: int, _: Any) -> tuple[Tensor, ...]:
        return tuple(drawn(frames * height * width, size // 2) for _ in range(2))

    monkeypatch.setattr(transformer.ops, "rope_table", rope_table)


def drawn(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("name", "format", "kind", "size", "frames", "samples", "guided"),
    [
        ("14B int8", "int8_row", "sla", (1280, 720), 81, 1, False),
        ("14B int8", "bf16", "original", (832, 480), 81, 1, False),
        ("A14B-I2V int8", "int8_block", "sla", (1280, 720), 81, 1, False),
        ("A14B-I2V int8", "fp8_row", "sla", (832, 480), 49, 1, True),
        ("1.3B", "bf16", "sla", (832, 480), 81, 1, False),
        ("1.3B", "int8_row", "sla", (416, 240), 33, 4, False),
    ],
)
def test_denoising(
    name: str, format: str, kind: str, size: tuple[int, int], frames: int, samples: int, guided: bool, told: bool
) -> None:
    """Two blocks, all else as large as it is; what fused operations hold inside themselves is in the workspace."""
    config = replace(COMMON[name][0], num_layers=2)
    with on_meta():
        net = WanTransformer(config, AttentionConfig(kind)).to(torch.bfloat16)
    for block in net.blocks:
        prepare_block(block, format, torch.bfloat16)
        join_qkv(block)
    work = Work(
        *size, frames, samples=samples, guided=guided, attention=kind, eight_bit=format != "bf16",
        encodes_image=config.in_dim > 16,
    )  # fmt: skip
    shape = samples, 16, *work.latent
    text, times = drawn(samples, 63, config.text_dim), drawn(samples)
    live = Live()
    with torch.inference_mode(), live:
        known = drawn(samples, 20, *work.latent) if work.encodes_image else None
        contexts = [net.tell(text, None, 512, told) for _ in range(1 + guided)]

        def velocity(latent: Tensor, t: float, _: int) -> Tensor:
            found = [net(*rcm.round_inputs(latent.float(), times, known)[:2], each, known) for each in contexts]
            return found[-1] + 5 * (found[0] - found[-1]) if guided else found[0]

        rcm.sample(velocity, [drawn(*shape) for _ in range(4)], rcm.timesteps(4, 80), False)
    assert live.most <= denoise_bytes(config, work, told) <= 1.06 * live.most + 1.5 * WORKSPACE


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    with on_meta():
        made = WanVAE().to(torch.bfloat16)
    made._statistics = lambda: (drawn(16, 1, 1, 1).bfloat16(),) * 2  # type: ignore[method-assign]
    return made


@pytest.fixture
def coder(vae: WanVAE) -> Coder:
    return Coder(vae.dim, sum(weight.nbytes for weight in vae.parameters()))


def most(run: Callable[[], object]) -> int:
    live = Live()
    with torch.inference_mode(), live:
        run()
    return live.most


@pytest.mark.parametrize("budget_gb", [20, 11, 8, 5])
@pytest.mark.parametrize("size", [(1280, 720), (832, 480)])
def test_decoding(size: tuple[int, int], budget_gb: int, vae: WanVAE, coder: Coder) -> None:
    work, budget = Work(*size, 81), budget_gb * 10**9

    def decode() -> None:
        leaving = deque[Tensor](maxlen=IN_FLIGHT)
        for chunk in vae.decode_stream(drawn(1, 16, *work.latent), budget):
            leaving.append(to_uint8(chunk).permute(0, 2, 3, 4, 1).contiguous())
            del chunk

    found, planned = most(decode), decode_bytes(coder, work, decode_grid(coder, work, budget))
    assert found <= planned <= 1.22 * found + WORKSPACE  # a chunk more than there are frames for counts, too


@pytest.mark.parametrize("budget_gb", [20, 5])
@pytest.mark.parametrize("size", [(1280, 720), (832, 480)])
def test_encoding_a_picture(size: tuple[int, int], budget_gb: int, vae: WanVAE, coder: Coder) -> None:
    work, budget = Work(*size, 81, encodes_image=True), budget_gb * 10**9
    found = most(lambda: vae.encode_first_frame(drawn(1, 3, size[1], size[0]), 81, budget))
    assert found <= encode_bytes(coder, work, budget) <= 1.5 * found  # what lies between tensors is in it
