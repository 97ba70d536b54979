"""The VAE's norm over channels, with and without SiLU."""

import pytest
import torch
import torch.nn.functional as F

from turbowan import ops

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_is_the_unit_vector_times_root_c(silu, dims, dtype, bar, relative_error):
    channels = 24
    x = (torch.randn(2, channels, *range(3, 3 + dims)) * 5).to(dtype)
    gamma = torch.randn(channels, *[1] * dims)
    wide = x.double()
    expected = F.normalize(wide, dim=1) * channels**0.5 * gamma.double()
    ours = ops.channel_norm(x, gamma, silu)
    assert ours.dtype == dtype
    assert relative_error(ours, F.silu(expected) if silu else expected) <= bar


def test_zero_vectors_stay_zero():
    assert not ops.channel_norm(torch.zeros(1, 4, 2, 2, 2), torch.ones(4, 1, 1, 1)).any()
