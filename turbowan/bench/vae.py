"""The VAE at true size on a GPU: decoding and first-frame encoding, whole and by kind of work."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..errors import RequestError
from ..models import vae_fused
from ..models.vae import LATENT_CHANNELS, SPATIAL_FACTOR, WanVAE, latent_frames
from .case import Case
from .op import time_case
from .pipeline import machine_facts

SIZES = {"480p": (480, 832), "720p": (720, 1280)}


# kind, start, end, multiply-adds times two, bytes
Mark = tuple[str, torch.cuda.Event, torch.cuda.Event, int, int]


class Timed(vae_fused.Layers):
    """Layers with a pair of CUDA events around each convolution, kernel and attention, kept in `marks`."""

    def __init__(self, marks: list[Mark], total: int | None = None) -> None:
        super().__init__(total)
        self._marks = marks
        self._inside = False

    def _timed(self, kind: str, run: Callable[[], Any], count: Callable[[Any], tuple[int, int]]) -> Any:
        if self._inside:
            return run()
        self._inside = True
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        self._inside = False
        self._marks.append((kind, start, end, *count(result)))
        return result

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        kind = f"conv3d {conv.kernel_size[1]}x{conv.kernel_size[1]} {_name(x)} to {conv.out_channels}"
        return self._timed(kind, lambda: super(Timed, self)._conv(conv, x), lambda y: _convolution(conv, x, y))

    def _conv_frames(self, conv: Any, x: Tensor, padding: int) -> Tensor:
        kind = f"conv2d {_name(x)} to {conv.out_channels}"
        run = lambda: super(Timed, self)._conv_frames(conv, x, padding)  # noqa: E731
        return self._timed(kind, run, lambda y: _convolution(conv, x, y))

    def _causal(self, layer: nn.Module | None, value: Any, *args: Any, **options: Any) -> Any:
        terms = [t for t in (value.x, value.residual) if t is not None]
        kind = f"causal_input {_name(value.x)}"
        run = lambda: super(Timed, self)._causal(layer, value, *args, **options)  # noqa: E731
        return self._timed(kind, run, lambda out: (0, _bytes(*terms, *out)))

    def _attention(self, block: Any, value: Any) -> Any:
        frames, positions, channels = value.x.shape[1], value.x[0, 0, :, :, 0].numel(), value.x.shape[-1]
        flops = frames * (4 * positions**2 * channels + 8 * positions * channels**2)
        run = lambda: super(Timed, self)._attention(block, value)  # noqa: E731
        return self._timed("attention", run, lambda _: (flops, 0))


def table_of(marks: list[Mark]) -> dict[str, dict[str, float]]:
    """By kind: milliseconds in all, and the rates they mean."""
    torch.cuda.synchronize()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for kind, start, end, flops, moved in marks:
        for i, value in enumerate((start.elapsed_time(end), flops, moved)):
            sums[kind][i] += value
    return {
        kind: {"ms": round(ms, 2)}
        | ({"tflops": round(flops / ms / 1e9, 1)} if flops else {})
        | ({"gbytes_per_s": round(moved / ms / 1e6)} if moved else {})
        for kind, (ms, flops, moved) in sorted(sums.items(), key=lambda item: -item[1][0])
        if ms > 0.05
    }


def _name(x: Tensor) -> str:
    return f"{x.shape[-1]}@{x.shape[2]}x{x.shape[3]}"


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _convolution(conv: Any, x: Tensor, out: Tensor) -> tuple[int, int]:
    return 2 * out[..., 0].numel() * math.prod(conv.weight.shape), _bytes(x, out)


def run_vae(
    resolution: str,
    num_frames: int,
    at_once: Sequence[int],
    tunes: Sequence[bool] = (False, True),
    repeats: int = 3,
    modules: bool = True,
    width: int = 96,
) -> Iterator[dict[str, Any]]:
    """One record for each way of decoding, and for the encoding of a first frame.

    Args:
        resolution: a key of SIZES. at_once: latent frames a chunk. tunes: with cuDNN's autotuning or without.
        repeats: timed runs after two. modules: the modules too, as they run without fused layers.

    Raises:
        RequestError: unknown size, or no GPU.
    """
    if resolution not in SIZES:
        raise RequestError(f"bench vae knows {', '.join(SIZES)}; got '{resolution}'")
    if not torch.cuda.is_available():
        raise RequestError("bench vae needs a CUDA device; there is none here")
    torch.manual_seed(0)
    height, width_px = SIZES[resolution]
    with torch.device("cuda"), torch.inference_mode():
        vae = WanVAE(width).bfloat16().eval()
        small = height // SPATIAL_FACTOR, width_px // SPATIAL_FACTOR
        latent = torch.randn(1, LATENT_CHANNELS, latent_frames(num_frames), *small)
        image = torch.rand(1, 3, height, width_px) * 2 - 1

    def decode() -> None:
        for _ in vae.decode_stream(latent):
            pass

    def encode() -> None:
        vae.encode_first_frame(image, num_frames)

    for tune in tunes:
        with torch.inference_mode(), _autotuned(tune):
            for latents in at_once:
                with patch.object(vae_fused, "LATENTS_AT_ONCE", latents):
                    record = {"latents_at_once": latents, "autotuned": tune}
                    yield _record(f"decode {resolution}", decode, repeats, True, record)
            yield _record(f"first frame {resolution}", encode, repeats, True, {"autotuned": tune})
    if modules:
        with torch.inference_mode(), patch.object(vae_fused, "serves", lambda x, coder: False):
            for name, run in (("decode", decode), ("first frame", encode)):
                yield _record(f"{name} {resolution}", run, 2, False, {"modules": True})


def _record(
    case: str, run: Callable[[], None], repeats: int, timed: bool, facts: dict[str, Any]
) -> dict[str, Any]:
    """Milliseconds of whole runs, of the host alone, peak memory, and the table of one run with events in it."""
    record = {"bench": "vae", "case": case, **machine_facts(torch.device("cuda", 0)), **facts}
    try:
        start = perf_counter()
        run()
        torch.cuda.synchronize()
        record["first_ms"] = round((perf_counter() - start) * 1e3)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times, host = [], []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = perf_counter()
            run()
            host.append(perf_counter() - start)
            torch.cuda.synchronize()
            times.append(perf_counter() - start)
        record["ms"] = {"min": round(min(times) * 1e3, 1), "p50": round(median(times) * 1e3, 1)}
        record["host_ms"] = round(median(host) * 1e3, 1)
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if timed:
            marks: list[Mark] = []
            with patch.object(vae_fused, "Layers", partial(Timed, marks)):
                run()
            record["table"] = table_of(marks)
    except Exception as error:  # one way that cannot run must not end the others
        record["failed"] = " ".join(str(error).split())[:300]
        torch.cuda.empty_cache()
    return record


@contextmanager
def _autotuned(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def kernel_cases(resolution: str, frames: int = 20, device: str = "cuda", channels: int = 96) -> Iterator[Case]:
    """The kernels at full size in every configuration of the sweep, and ways to have the same convolution done."""
    from ..ops.triton.causal_input import candidates, causal_input
    from ..ops.triton.upsample import upsample

    height, width = SIZES[resolution]
    x, residual = (torch.randn(1, frames, height, width, channels, device=device).bfloat16() for _ in range(2))
    bias, gamma = (torch.randn(channels, device=device).bfloat16() for _ in range(2))
    past = residual[:, :2].contiguous()
    small = torch.randn(1, frames, height // 2, width // 2, 2 * channels, device=device).bfloat16()
    one = _bytes(x)
    shape: dict[str, int | float] = {"frames": frames, "height": height, "width": width, "channels": channels}
    for config in candidates():
        kept = (x, bias, residual, gamma, past, True, 2, frames, True, 0, config)
        inner = (x, bias, None, gamma, past, True, 2, frames, False, 1, config)
        yield Case(f"causal_input block {config}", partial(causal_input, *kept), shape, bytes=4 * one)
        yield Case(f"causal_input inner {config}", partial(causal_input, *inner), shape, bytes=2 * one)
        up = (small, None, small, None, 1, config)
        yield Case(f"upsample {config}", partial(upsample, *up), shape, bytes=3 * one)
    yield Case("copy", x.clone, shape, bytes=2 * one)
    del residual, small, kept, inner, up
    yield from _attentions(torch.randn(frames, height * width // 64, 3 * 4 * channels, device=device).bfloat16())
    yield from _convolutions(causal_input(x, None, None, None, past, False, 2, frames, False, 0)[0], shape)


def _attentions(qkv: Tensor) -> Iterator[Case]:
    """The middle's attention, one head as wide as the channels: PyTorch's, and as products of a few rows at a time."""
    q, k, v = qkv.chunk(3, dim=-1)
    count, positions, channels = q.shape
    shape: dict[str, int | float] = {"frames": count, "positions": positions, "channels": channels}
    flops = 4 * count * positions**2 * channels

    def whole() -> Tensor:
        heads = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(*heads).squeeze(1)

    yield Case("attention", whole, shape, flops)
    for rows in (256, 1024, 4096):
        yield Case(f"attention, {rows} rows at a time", partial(_by_products, q, k, v, rows), shape, flops)


def _by_products(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Scores in float32; frame after frame, so that they stay in the cache."""
    out = torch.empty_like(v)
    for i in range(len(q)):
        for start in range(0, q.shape[1], rows):
            scores = torch.mm(q[i, start : start + rows], k[i].T, out_dtype=torch.float32)
            weights = scores.mul_(q.shape[-1] ** -0.5).softmax(dim=-1).to(q.dtype)
            torch.mm(weights, v[i], out=out[i, start : start + rows])
    return out


def _convolutions(x: Tensor, shape: dict[str, int | float]) -> Iterator[Case]:
    """cuDNN's convolution: height and width padded by it or before, channels filled up, or as three in 2-D."""
    channels = x.shape[-1]
    last = torch.channels_last_3d
    weight = torch.randn(channels, channels, 3, 3, 3, device=x.device, dtype=x.dtype).contiguous(memory_format=last)
    view = x.permute(0, 4, 1, 2, 3)
    flops = 54 * channels * channels * int(shape["frames"] * shape["height"] * shape["width"])
    conv = torch.nn.functional.conv3d
    yield Case("conv3d", partial(conv, view, weight, padding=(0, 1, 1)), shape, flops)
    larger = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1)).permute(0, 4, 1, 2, 3)
    yield Case("conv3d, padded before", partial(conv, larger, weight), shape, flops)
    rows = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, 32)).contiguous(memory_format=last)
    yield Case("conv3d, 32 more results", partial(conv, view, rows, padding=(0, 1, 1)), shape, flops)
    both = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, 32)).contiguous(memory_format=last)
    wide = torch.nn.functional.pad(x, (0, 32)).permute(0, 4, 1, 2, 3)
    yield Case("conv3d, 32 more channels", partial(conv, wide, both, padding=(0, 1, 1)), shape, flops)
    pairs = vae_fused.for_pairs(weight).contiguous(memory_format=last)
    columns = torch.nn.functional.pad(x, (0, 0, 1, 1)).unflatten(3, (-1, 2)).flatten(4).permute(0, 4, 1, 2, 3)
    yield Case("conv3d, pairs of columns", partial(conv, columns, pairs, padding=(0, 1, 0)), shape, flops)
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)
    flat = weight.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    conv2d = torch.nn.functional.conv2d
    yield Case("conv2d, all three frames' results", partial(conv2d, frames, flat, padding=1), shape, flops)


def run_kernels(resolution: str, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """A record for each of `kernel_cases`, convolutions with cuDNN's autotuning and without."""
    with torch.inference_mode():
        for case in kernel_cases(resolution):
            for tune in (False, True) if "conv" in case.name else (False,):
                with _autotuned(tune):
                    yield {"bench": "vae", "case": case.name, "autotuned": tune, **time_case(case, repeats)}
