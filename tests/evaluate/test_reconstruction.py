"""What is reported of a VAE: exact where the answer is known, good for the embedded one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import turbowan
from turbowan.checkpoints import load_vae
from turbowan.errors import CheckpointError, RequestError
from turbowan.evaluate.reconstruction import GATE, check_gate, evaluate_vae, psnr

SIZE = {"frames": 17, "height": 96, "width": 160}


class Known:
    """In place of a VAE: gives videos back with a known error, per frame of the clip."""

    def __init__(self, *offsets: float) -> None:
        self.offsets = torch.tensor(offsets).view(1, 1, -1, 1, 1)

    def encode(self, video: Tensor) -> Tensor:
        return video

    def decode(self, latent: Tensor) -> Tensor:
        return latent - latent.sign() * self.offsets  # towards grey, so that nothing is clamped


def test_psnr_is_on_the_scale_of_two() -> None:
    assert psnr(4.0) == 0
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(0) == pytest.approx(106.02, abs=0.01)


def test_what_is_kept_whole_is_reported_so() -> None:
    report = evaluate_vae(Known(0.0), 10, **SIZE, batch=4)  # type: ignore[arg-type]
    assert report["clips"] == 10
    assert report["psnr"] == pytest.approx(106.02, abs=0.01)
    assert len(report["psnr_by_frame"]) == 17  # type: ignore[arg-type]
    assert report["kept"]["share"] == 1.0  # type: ignore[index]
    assert report["kept"]["total"] == 10  # type: ignore[index]


def test_errors_are_reported_where_they_are() -> None:
    offsets = [0.02] * 16 + [0.2]
    report = evaluate_vae(Known(*offsets), 3, **SIZE, batch=2)  # type: ignore[arg-type]
    by_frame = report["psnr_by_frame"]
    assert by_frame[:16] == [pytest.approx(psnr(0.02**2), abs=0.02)] * 16  # type: ignore[index]
    assert by_frame[16] == pytest.approx(psnr(0.2**2), abs=0.3)  # type: ignore[index]
    assert report["psnr"] == pytest.approx(psnr((16 * 0.02**2 + 0.2**2) / 17), abs=0.2)


def test_lost_points_are_counted() -> None:
    grey = Known(1.0)  # all colours nearly gone
    report = evaluate_vae(grey, 6, **SIZE)  # type: ignore[arg-type]
    assert report["kept"]["right"] == 0  # type: ignore[index]
    assert report["psnr"] < GATE["psnr"]  # type: ignore[operator]


def test_camera_clips_have_no_points() -> None:
    report = evaluate_vae(Known(0.1), 2, frames=5, height=48, width=64, camera=True)  # type: ignore[arg-type]
    assert report["kept"] is None
    assert math.isfinite(report["psnr"])  # type: ignore[arg-type]


def test_the_embedded_vae_passes_its_gate() -> None:
    vae = load_vae(Path(turbowan.__file__).parent / "assets" / "tiny" / "vae.safetensors")
    report = evaluate_vae(vae, 2, 9, 128, 160)
    assert report["psnr"] > GATE["psnr"] - 3  # type: ignore[operator]  # two short clips scatter
    assert min(report["psnr_by_frame"]) > 22  # type: ignore[call-overload]
    assert len(report["psnr_by_frame"]) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [(0, 8), (-1, 8), (4, 0)])
def test_an_evaluation_of_nothing_is_refused(numbers: tuple[int, int]) -> None:
    clips, batch = numbers
    with pytest.raises(RequestError, match=f"at least 1 clip, 1 at a time; got {clips}, {batch} at a time"):
        evaluate_vae(Known(0.0), clips, batch=batch)  # type: ignore[arg-type]


def test_the_gate_names_what_is_too_low() -> None:
    check_gate({"psnr": 28.0, "kept": {"share": 0.97}}, "vae")
    with pytest.raises(CheckpointError, match=r"vae is not good enough.*psnr 27\.9 \(at least 28\); train it longer"):
        check_gate({"psnr": 27.9, "kept": {"share": 1.0}}, "vae")
    with pytest.raises(CheckpointError, match=r"kept 0\.9375 \(at least 0\.97\)"):
        check_gate({"psnr": 34.9, "kept": {"share": 0.9375}}, "vae")
