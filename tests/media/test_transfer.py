"""Chunks of a video become whole frames in host memory, in order, whatever device they come from."""

from __future__ import annotations

import pytest
import torch

from turbowan.media.transfer import IN_FLIGHT, to_host

on_gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")])


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize(("batch", "chunks"), [(1, 1), (3, 6), (2, 3 * IN_FLIGHT)])
def test_frames_arrive_in_order_and_whole(device, batch, chunks, fresh_seed):
    sizes = [1] + [4] * (chunks - 1)
    video = torch.randint(0, 256, (batch, 3, sum(sizes), 24, 40), dtype=torch.uint8)
    out = torch.zeros(batch, sum(sizes), 24, 40, 3, dtype=torch.uint8)
    wanted = video.permute(0, 2, 3, 4, 1)
    seen = 0
    for start, stop in to_host(iter(video.to(device).split(sizes, dim=2)), out):
        assert start == seen
        seen = stop
        assert torch.equal(out[:, :stop], wanted[:, :stop])
    assert seen == sum(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slow_chunks_arrive_whole_and_pinned_memory_does_not_grow():
    """Each chunk is work of some milliseconds on the GPU. Giving up after the first does no harm, either."""
    work = torch.randn(4096, 4096, device="cuda")
    out = torch.empty(1, 81, 480, 832, 3, dtype=torch.uint8)

    def chunks():
        for i in range(21):
            value = (work @ work @ work).flatten()[0].isnan().to(torch.uint8)  # 0, late
            yield torch.full((1, 3, 4 if i else 1, 480, 832), i + 1, dtype=torch.uint8, device="cuda") + value

    def pinned() -> int:
        return torch.cuda.host_memory_stats()["allocated_bytes.current"]

    before = pinned()
    for _ in range(4):
        assert next(iter(to_host(chunks(), out))) == (0, 1)
        for start, stop in to_host(chunks(), out):
            assert (out[0, start:stop] == (start + 3) // 4 + 1).all()
    assert out[0, 0, 0, 0, 0] == 1
    assert out[0, -1, -1, -1, -1] == 21
    # a chunk's 4.8 MB are rounded up to a power of two; a pass given up and one that goes on may both be under way
    assert pinned() - before <= 2 * (IN_FLIGHT + 3) * 2**23
