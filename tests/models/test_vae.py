"""The VAE: recorded results of the official code, diffusers' with the same weights, streaming and short cuts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from turbowan.checkpoints import load_vae
from turbowan.errors import RequestError
from turbowan.models.vae import LATENT_MEAN, LATENT_STD, Clip, Steady, latent_frames

FRAMES = [1, 5, 17, 49, 81, 121]


def random_video(batch, frames, height, width):
    """Values in -1..1 that vary in space and time."""
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


@pytest.fixture
def per_channel():
    return [torch.tensor(x).view(1, -1, 1, 1, 1) for x in (LATENT_MEAN, LATENT_STD)]


# --- recorded, and peers ----------------------------------------------------------------------------------------------


def test_recorded_encoding(golden, recorded, relative_error):
    video, latent, padded = recorded("vae.io.safetensors", "video", "latent", "latent_first_frame_padded")
    vae = load_vae(golden("vae.pth"))
    assert relative_error(vae.encode(video), latent) <= 1e-4
    assert relative_error(vae.encode_first_frame(video[:, :, 0], video.shape[2]), padded) <= 1e-4


def test_recorded_decoding(golden, recorded, relative_error):
    """Unclamped: the recording passes -1..1 here and there."""
    latent, recon = recorded("vae.io.safetensors", "latent", "recon")
    ours = load_vae(golden("vae.pth")).decode(latent)
    assert ours.dtype == torch.float32
    assert relative_error(ours, recon) <= 1e-4


def test_equals_diffusers(tmp_path, fresh_seed, per_channel, relative_error):
    """Both ways, with random norms and biases, from a diffusers folder. diffusers' latents are not normalised."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.AutoencoderKLWan(base_dim=8).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if parameter.ndim == 1 or "gamma" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path / "vae")
    mean, std = per_channel
    video, latent = random_video(2, 9, 24, 40), torch.randn(2, 16, 3, 3, 5)
    with torch.no_grad():
        expected = (peer.encode(video).latent_dist.mode() - mean) / std
        assert relative_error(vae.encode(video), expected) <= 1e-4
        expected = peer.decode(latent * std + mean).sample  # clamped there
        assert relative_error(vae.decode(latent).clamp(-1, 1), expected) <= 1e-4
        assert expected.abs().lt(1).double().mean() > 0.5


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_stream_is_one_frame_then_fours_and_together_the_decoding(latents, make_vae):
    vae, latent = make_vae(), torch.randn(2, 16, latents, 2, 3)
    chunks = list(vae.decode_stream(latent))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, 3, 1, 16, 24), *[(2, 3, 4, 16, 24)] * (latents - 1)]
    assert {chunk.dtype for chunk in chunks} == {torch.float32}
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latent))


def test_streams_do_not_share_their_past(make_vae):
    """Two videos decoded in turns, chunk by chunk, as two requests of a server would be."""
    vae, latents = make_vae(), [torch.randn(1, 16, 3, 2, 2) for _ in range(2)]
    turns = zip(*(vae.decode_stream(latent) for latent in latents), strict=True)
    for latent, chunks in zip(latents, zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latent))


def test_decoding_is_causal(make_vae):
    """What is shown already does not depend on latents still to come."""
    vae, latent = make_vae(), torch.randn(1, 16, 4, 2, 2)
    changed = latent.clone()
    changed[:, :, 2:] += 1
    ours, other = vae.decode(latent), vae.decode(changed)
    assert torch.equal(ours[:, :, :5], other[:, :, :5])
    assert not torch.equal(ours[:, :, 5:], other[:, :, 5:])


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_chunks_encode_as_the_whole_clip(frames, make_vae, relative_error):
    vae, video = make_vae(), random_video(2, frames, 16, 24)
    latent = vae.encode(video)
    assert latent.shape == (2, 16, latent_frames(frames), 2, 3)
    assert relative_error(vae.encode_whole(video), latent) <= 1e-5


def test_encoding_is_causal(make_vae):
    vae, video = make_vae(), random_video(1, 13, 16, 16)
    changed = video.clone()
    changed[:, :, 5:] = -changed[:, :, 5:]
    ours, other = vae.encode(video), vae.encode(changed)
    assert torch.equal(ours[:, :, :2], other[:, :, :2])
    assert not torch.equal(ours[:, :, 2:], other[:, :, 2:])


def test_samples_do_not_see_each_other(make_vae, relative_error):
    vae, video = make_vae(), random_video(3, 5, 16, 16)
    latent = vae.encode(video)
    decoded = vae.decode(latent)
    for i in range(3):
        assert relative_error(vae.encode(video[i : i + 1]), latent[i : i + 1]) <= 1e-5
        assert relative_error(vae.decode(latent[i : i + 1]), decoded[i : i + 1]) <= 1e-5


def test_leaves_its_inputs_alone(make_vae):
    vae, video, latent = make_vae(), random_video(1, 5, 16, 16), torch.randn(1, 16, 2, 2, 2)
    before = video.clone(), latent.clone()
    vae.encode(video), vae.decode(latent), vae.encode_first_frame(video[:, :, 0], 9)
    assert torch.equal(video, before[0])
    assert torch.equal(latent, before[1])


# --- the first frame alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", FRAMES)
def test_first_frame_equals_the_padded_clip(frames, make_vae, relative_error):
    """Everything after the picture is 0.0, so what changes no more is repeated instead of computed."""
    vae, image = make_vae(), random_video(2, 1, 16, 24)
    video = torch.cat([image, torch.zeros(2, 3, frames - 1, 16, 24)], dim=2)
    ours, expected = vae.encode_first_frame(image[:, :, 0], frames), vae.encode(video)
    assert relative_error(ours, expected) <= 1e-5
    assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("frames", [17, 81, 121])
def test_first_frame_stops_nowhere_too_early(frames, make_vae):
    """With random weights the first frame fades before the deepest layers lose sight of it: one that stopped a frame
    early would pass unseen. Here the oldest frame that a convolution sees weighs eight times more, and stopping early
    anywhere is off by 1e-4 and more."""
    vae = make_vae().double()
    for layer in vae.encoder.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 3:
            layer.weight[:, :, 0] *= 8
    start = torch.zeros(1, 3, frames, 8, 16, dtype=torch.float64)
    start[:, :, 0] = random_video(1, 1, 8, 16)[:, :, 0]
    expected, clip = vae.encoder(start, Clip()), Steady(frames)
    ours = clip.match(vae.encoder(start[:, :, :2], clip), latent_frames(frames))
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def test_first_frame_takes_at_most_two_fifths_of_the_work(make_vae):
    """Multiply-adds at 81 frames."""
    vae, image = make_vae(), random_video(1, 1, 32, 32)
    video = torch.cat([image, torch.zeros(1, 3, 80, 32, 32)], dim=2)
    assert flops(vae.encode_first_frame, image[:, :, 0], 81) <= 0.4 * flops(vae.encode, video)


def test_the_counted_work_is_all_of_it(make_vae):
    """The count above against one made by hand: every convolution's, and the attention of the middle."""
    vae, video, total = make_vae(), random_video(1, 5, 32, 24), 0

    def count(layer, args, out):
        nonlocal total
        total += 2 * out.numel() * layer.weight[0].numel()

    for layer in vae.encoder.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            layer.register_forward_hook(count)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch does not count its fused attention of the CPU
        counted = flops(vae.encoder, video, Clip())
    positions, width = 4 * 3, 4 * vae.dim
    assert counted - total == 2 * (2 * positions**2 * width) * latent_frames(5)


# --- dtypes and refusals ----------------------------------------------------------------------------------------------


def test_bfloat16_is_near_float32(make_vae, relative_error):
    vae, video = make_vae(8), random_video(1, 9, 32, 32)
    latent = vae.encode(video)
    decoded = vae.decode(latent)
    vae.to(torch.bfloat16)
    assert vae.encode(video).dtype == vae.decode(latent).dtype == torch.float32
    assert 1e-4 < relative_error(vae.encode(video), latent) < 0.08
    assert 1e-4 < relative_error(vae.decode(latent), decoded) < 0.08


def test_latents_are_normalised_by_wans_statistics(make_vae, per_channel):
    """An encoder that gives exactly the mean gives latents of 0; one standard deviation more, latents of 1."""
    vae = make_vae()
    mean, std = (x.flatten() for x in per_channel)
    nn.init.zeros_(vae.conv1.weight)
    for target, value in ((mean, 0.0), (mean + std, 1.0)):
        vae.conv1.bias[:16] = target
        assert torch.allclose(vae.encode(random_video(1, 1, 8, 8)), torch.full((1, 16, 1, 1, 1), value), atol=1e-6)


@pytest.mark.parametrize("frames", [0, 2, 4, 80])
def test_refuses_frame_counts_other_than_4k_plus_1(frames, make_vae):
    vae = make_vae()
    with pytest.raises(RequestError, match=rf"frame count must be 4k\+1 \(1, 5, 9, ... 81\), got {frames}"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))
    with pytest.raises(RequestError, match=f"got {frames}"):
        vae.encode_first_frame(torch.zeros(1, 3, 16, 16), frames)


@pytest.mark.parametrize(("height", "width"), [(17, 16), (16, 31), (0, 16)])
def test_refuses_sizes_that_are_no_multiple_of_8(height, width, make_vae):
    with pytest.raises(RequestError, match=f"multiples of 8, got {height}x{width}"):
        make_vae().encode(torch.zeros(1, 3, 5, height, width))


def test_gradients_reach_every_parameter(make_vae):
    """The VAE is trained through the same layers."""
    vae = make_vae().requires_grad_()
    video = random_video(1, 9, 16, 16)
    loss = F.mse_loss(vae.decode(vae.encode_whole(video)), video)
    loss.backward()
    idle = {"conv1.weight", "conv1.bias"}  # their second half, the log variance, takes no part
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert name in idle or parameter.grad.abs().sum() > 0, name
