"""What `--precision auto` chooses: figures, budget and kernels, for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from turbowan import ops
from turbowan.ops import formats
from turbowan.ops.formats import ARCHITECTURES, BUDGET, ERRORS, architecture, choose_format, compute_dtype, whole_error
from turbowan.ops.registry import OPERATIONS
from turbowan.ops.rows import FORMATS, quantize_rows

EIGHT_BITS = ("int8_row", "fp8_row", "int8_block")


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    """As where Triton and PyTorch 2.11 are installed, whatever this machine has."""
    monkeypatch.setattr("turbowan.ops.registry._installed", lambda package: True)
    real = formats.Facts
    monkeypatch.setattr(formats, "Facts", lambda *args, **kwargs: real(*args, **{"pytorch": "2.11.0", **kwargs}))


CHOICES = {  # capability -> what files in int8 blocks, int8 rows and fp8 rows run in
    (7, 0): ("int8_block", "int8_row", "fp8_row"),
    (7, 5): ("int8_block", "int8_row", "fp8_row"),
    (8, 0): ("int8_block", "int8_row", "int8_row"),  # no fp8 there
    (8, 6): ("int8_block", "int8_row", "int8_row"),
    (8, 9): ("int8_block", "int8_row", "fp8_row"),
    (9, 0): ("int8_row", "int8_row", "fp8_row"),
    (10, 0): ("int8_block", "int8_row", "fp8_row"),
    (10, 3): ("bf16", "bf16", "fp8_row"),  # hardly any int8
    (11, 0): ("int8_block", "int8_row", "fp8_row"),  # of the first of the generation before, not of its odd member
    (12, 0): ("int8_block", "int8_row", "int8_row"),  # no PyTorch with fp8 rows there
    (13, 0): ("int8_block", "int8_row", "int8_row"),
}


@pytest.mark.parametrize("capability", list(CHOICES))
def test_choices(capability):
    files = ("int8_block", "int8_row", "fp8_row")
    assert tuple(choose_format(capability, own).format for own in files) == CHOICES[capability]


@pytest.mark.parametrize("capability", [None, *CHOICES])
def test_full_precision_and_unknown_layers_stay(capability):
    for own in ("bf16", "fp8_scaled", "mixed"):
        assert choose_format(capability, own, budget=1.0).format == own


def test_on_a_cpu_every_file_keeps_its_format():
    for own in FORMATS:
        choice = choose_format(None, own, budget=1.0)
        assert (choice.format, choice.measured) == (own, False)


def test_only_our_own_timings_count_as_measured():
    for capability in CHOICES:
        for own in EIGHT_BITS:
            choice = choose_format(capability, own)
            assert choice.measured == (capability == (9, 0))
            known = architecture(capability)
            assert known is None or known.source in choice.why
            assert known is None or ("not measured, after" in choice.why) != choice.measured


def test_a_change_is_told_with_its_gain_and_its_error():
    why = choose_format((9, 0), "int8_block").why
    assert why.startswith(
        "1.28 times as fast as the file's int8_block; adds 0.0123, within 0.015; "
        "about 0.0154 against the original weights, 0.0132 in the file's format (measured on an H200"
    )
    assert "about 0.0293 against the original weights" in choose_format((8, 0), "fp8_row").why
    assert choose_format((9, 1), "int8_block").format == "int8_block"  # those timings are of another chip


def test_the_budget_decides():
    rows = ERRORS["int8_block"]["int8_row"]
    assert choose_format((9, 0), "int8_block", budget=rows).format == "int8_row"
    assert choose_format((9, 0), "int8_block", budget=rows - 1e-4).format == "int8_block"
    assert choose_format((10, 3), "int8_row", budget=0.001).format == "int8_row"
    assert choose_format((10, 3), "int8_row", budget=0.04).format == "fp8_row"
    assert choose_format((8, 0), "fp8_row", budget=0.001).format == "fp8_row"  # in plain PyTorch then
    for own in FORMATS:
        assert ERRORS[own]["fp8_row"] > BUDGET  # never chosen for another file by default


def test_without_kernels_files_keep_their_format(monkeypatch):
    monkeypatch.setattr("turbowan.ops.registry._installed", lambda package: False)
    for capability in CHOICES:
        for own in EIGHT_BITS:
            choice = choose_format(capability, own)
            assert choice.format == own
    assert "in plain PyTorch" in choose_format((9, 0), "int8_block").why


def test_a_format_without_a_kernel_is_not_chosen(monkeypatch):
    operation = OPERATIONS["product_int8_rowwise"]
    monkeypatch.setattr(operation, "implementations", operation.implementations[:1])
    monkeypatch.setattr(operation, "_chosen", {})
    assert choose_format((9, 0), "int8_block").format == "int8_block"


def test_figures_are_whole():
    for capability, known in ARCHITECTURES.items():
        assert set(known.rates) - {"fp8_row"} == {"bf16", "int8_row", "int8_block"}
        assert ("fp8_row" in known.rates) == (capability >= (8, 9))
        assert known.source
    assert [capability for capability, known in ARCHITECTURES.items() if known.measured] == [(9, 0)]
    assert set(ERRORS) == set(FORMATS)
    assert all(set(errors) == set(FORMATS) for errors in ERRORS.values())


def test_what_is_computed_in():
    dtypes = {capability: compute_dtype(capability) for capability in [None, *CHOICES]}
    assert dtypes[None] == torch.float32
    assert dtypes[7, 0] == dtypes[7, 5] == torch.float16
    assert {dtype for capability, dtype in dtypes.items() if capability and capability >= (8, 0)} == {torch.bfloat16}


def numbers(x, format):
    """What rows in a format stand for."""
    codes, scale = quantize_rows(x, format)
    if format == "int8_block":
        return ops.dequantize_int8_blockwise(codes, scale)
    return codes.float() * scale


@pytest.mark.parametrize("own", FORMATS)
def test_errors_are_those_of_gaussian_numbers(own, relative_error, fresh_seed):
    x, whole = torch.randn(256, 5120), torch.randn(256, 5120)
    weight = whole if own == "bf16" else numbers(whole, own)
    for format in EIGHT_BITS:
        rounded = weight if format == own else numbers(weight, format)
        error = relative_error(numbers(x, format) @ rounded.T, x @ weight.T)
        assert error == pytest.approx(ERRORS[own][format], rel=0.05)
        if own != "bf16":  # and from before the file was rounded
            error = relative_error(numbers(x, format) @ rounded.T, x @ whole.T)
            assert error == pytest.approx(whole_error(own, format), rel=0.05)
    x, weight = x.bfloat16(), weight.bfloat16()
    error = relative_error((x @ weight.T).float(), x.float() @ weight.float().T)
    assert error == pytest.approx(ERRORS[own]["bf16"], rel=0.1)
