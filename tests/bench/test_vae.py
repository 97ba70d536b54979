"""The cases of the VAE's kernels and convolutions: each runs, at a small size by Triton's interpreter."""

import pytest
import torch

from turbowan.bench import vae
from turbowan.errors import RequestError


def test_every_kernel_and_convolution(monkeypatch, kernels):
    monkeypatch.setitem(vae.SIZES, "small", (16, 24))
    done = {}
    for case in vae.kernel_cases("small", frames=2, device=kernels.type, channels=16):
        if "rows at a time" in case.name and kernels.type == "cpu":
            continue  # PyTorch multiplies into float32 on a GPU only
        result = case.run()
        done[case.name] = result
        assert case.flops or case.bytes
    assert len(done) == 18 + 1 + 1 + 6 + (3 if kernels.type == "cuda" else 0)
    assert torch.allclose(done["conv3d"].float(), done["conv3d, padded before"].float(), rtol=0.02, atol=0.1)
    assert torch.allclose(done["conv3d"].float(), done["conv3d, 32 more results"][:, :16].float(), rtol=0.02, atol=0.1)
    pairs = done["conv3d, pairs of columns"].unflatten(1, (2, 16)).movedim(1, -1).flatten(-2)
    assert torch.allclose(done["conv3d"].float(), pairs.float(), rtol=0.02, atol=0.1)


def test_refuses_what_it_does_not_know():
    with pytest.raises(RequestError, match="bench vae knows 480p, 720p; got '8k'"):
        next(vae.run_vae("8k", 81, [5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_narrow_vae_in_every_way(monkeypatch):
    monkeypatch.setitem(vae.SIZES, "small", (64, 96))
    records = list(vae.run_vae("small", 9, [1, 2], repeats=1, width=16))
    assert len(records) == 2 * 3 + 2
    assert not [record["failed"] for record in records if "failed" in record]
    assert all(record["table"] for record in records if "modules" not in record)
