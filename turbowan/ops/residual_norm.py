"""What stands between two linear layers of a block: gate and residual, LayerNorm, modulation, rounding to 8 bits.

The roundings are those of the separate steps, in their order: the gate, the gated change, the sum, the LayerNorm and
the modulated row are each rounded to x's dtype.
"""

from torch import Tensor

from ..errors import RequestError
from .layer_norm import VARIANCES, layer_norm
from .registry import Operation
from .rows import check_format, quantize_rows, rows_fake, sample_rows
from .triton import offer


def _eager(
    x: Tensor,
    delta: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    variance: str,
    format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x_new = x.new_empty(0)  # an operation may not return its input
    if delta is not None:
        x = x_new = (x + (delta if gate is None else delta * gate.to(x.dtype))).contiguous()
    normed = layer_norm(x, weight, bias, eps, variance)
    if scale is not None and shift is not None:
        normed = (normed.float() * (1 + scale) + shift).to(x.dtype)
    return x_new, *quantize_rows(sample_rows(normed, format).contiguous(), format)


def _fake(
    x: Tensor,
    delta: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    variance: str,
    format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(0 if delta is None else x.shape), *rows_fake(x, format)


_operation = Operation("residual_norm", _eager, _fake)
offer(_operation, "residual_norm", "residual_norm")


def residual_norm(
    x: Tensor,
    delta: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    variance: str = "exact",
    format: str = "bf16",
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta * gate, and the LayerNorm of that sum * (1 + scale) + shift as the rows that a linear layer reads.

    Args:
        x, delta: [B, L, D], any strides between rows and samples; without delta, x stays as it is.
        gate, shift, scale: float32 [B, 1, D], any stride between samples. No gate: 1. Shift and scale: both or none.
        weight, bias: [D] or None, LayerNorm's own.
        variance: "exact", or "official" for the fast kernel's (see `layer_norm`).
        format: one of `rows.FORMATS`.

    Returns:
        The sum [B, L, D] in x's dtype (x itself without delta); rows [B * L, D] in the format; their scales (empty for
        "bf16"). For "int8_block" blocks never cross samples: of B > 1 samples each has its rows padded with zeros to a
        multiple of 128, rows [B * ceil(L / 128) * 128, D] and scales [B * ceil(L / 128), ceil(D / 128)].

    Raises:
        RequestError: unknown variance or format, a gate without delta, or only one of shift and scale.
    """
    if variance not in VARIANCES:
        raise RequestError(f"norms must be one of {', '.join(VARIANCES)}, got '{variance}'")
    check_format(format)
    if (shift is None) != (scale is None) or (gate is not None and delta is None):
        raise RequestError("residual_norm takes shift and scale together, and a gate only with a delta")
    x_new, rows, row_scale = _operation(x, delta, gate, weight, bias, shift, scale, eps, variance, format)
    return (x if delta is None else x_new), rows, row_scale
