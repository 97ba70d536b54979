"""Where the noise comes from."""

import torch

from turbowan.sampling import noise


def test_draws_follow_each_other_from_one_generator(fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    one, two = noise.draw((2, 3), 2, fresh_seed)
    assert torch.equal(one, torch.randn(2, 3, generator=generator))
    assert torch.equal(two, torch.randn(2, 3, generator=generator))
    assert torch.equal(noise.draw((2, 3), 1, fresh_seed)[0], one)
    assert one.dtype == torch.float32
