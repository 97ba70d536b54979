"""The VAE's layers for a GPU against the modules: in float32 by the operations' eager twins, on a GPU in bfloat16."""

import pytest
import torch

from turbowan.models import vae_fused, vae_tiles
from turbowan.models.vae import Steady, WanVAE, latent_frames

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.fixture
def fused(monkeypatch):
    """Every VAE runs through the fused layers, several latent frames at once."""

    def switch(latents_at_once=3):
        monkeypatch.setattr(vae_fused, "serves", lambda x, coder: True)
        monkeypatch.setattr(vae_fused, "LATENTS_AT_ONCE", latents_at_once)

    return switch


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("latents", [1, 2, 5])
def test_decodes_as_the_modules(latents, at_once, make_vae, fused, relative_error):
    vae, latent = make_vae(), torch.randn(2, 16, latents, 3, 2)
    expected = vae.decode(latent)
    fused(at_once)
    chunks = list(vae.decode_stream(latent))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (latents - 1)
    assert {chunk.dtype for chunk in chunks} == {torch.float32}
    assert relative_error(torch.cat(chunks, dim=2), expected) <= 1e-5


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encodes_as_the_modules(frames, at_once, make_vae, fused, relative_error):
    vae, video = make_vae(), torch.rand(2, 3, frames, 16, 24) * 2 - 1
    expected = vae.encode(video)
    fused(at_once)
    assert relative_error(vae.encode(video), expected) <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 49, 81])
def test_first_frame_as_the_modules(frames, make_vae, fused, relative_error):
    """In float64 with the oldest frames weighing most, as stopping a frame early shows nowhere else."""
    vae, image = make_vae().double(), torch.rand(2, 3, 8, 16, dtype=torch.float64) * 2 - 1
    for layer in vae.encoder.modules():
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size[0] == 3:
            layer.weight[:, :, 0] *= 8
    start = torch.stack([image, torch.zeros_like(image)], dim=2)[:, :, :frames]
    clip = Steady(frames)
    expected = clip.match(vae.encoder(start, clip), latent_frames(frames))
    ours = Steady(frames).match(vae_fused.encode(vae.encoder, start, frames), latent_frames(frames))
    assert relative_error(ours, expected) <= 1e-6


def test_recorded_cases(golden, recorded, fused, relative_error):
    from turbowan.checkpoints import load_vae

    names = ("video", "latent", "latent_first_frame_padded", "recon")
    video, latent, padded, recon = recorded("vae.io.safetensors", *names)
    vae = load_vae(golden("vae.pth"))
    fused()
    assert relative_error(vae.encode(video), latent) <= 1e-5
    assert relative_error(vae.encode_first_frame(video[:, :, 0], video.shape[2]), padded) <= 1e-5
    assert relative_error(vae.decode(latent), recon) <= 1e-5


@pytest.mark.parametrize(
    ("total", "most", "parts"), [(21, 5, [5, 4, 4, 4, 4]), (21, 7, [7, 7, 7]), (1, 5, [1]), (6, 5, [3, 3])]
)
def test_chunks_are_even(total, most, parts):
    assert vae_fused.split_evenly(total, most) == parts


def test_chunks_stay_below_what_32_bits_index():
    for height, width in ((60, 104), (90, 160), (135, 240)):
        assert vae_fused.most_at_once(1, height, width, 192) * 4 * 64 * height * width * 192 < 2**31
    assert vae_fused.most_at_once(9, 270, 480, 192) == 1


def seeing_far(coder):
    """Later positions of every convolution weigh more: what a halo leaves out shows."""
    for layer in coder.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d)) and layer.kernel_size[-1] == 3:
            layer.weight *= torch.tensor([4.0, 1.0, 4.0]).to(layer.weight)
            layer.weight[..., (0, 2), :] *= 4


def in_tiles(vae, latent, image, grid, monkeypatch):
    for name in ("decoder_grid", "encoder_grid"):
        monkeypatch.setattr(vae_fused, name, lambda *_: vae_tiles.Grid(*grid, 1))
    video = torch.cat(list(vae_fused.decode(vae.decoder, latent)), dim=2)
    return video, vae_fused.encode(vae.encoder, image, 5)


@pytest.mark.parametrize(("grid", "height", "width"), [((1, 3), 2, 34), ((3, 1), 34, 2), ((2, 2), 28, 28)])
def test_tiles_make_the_whole(grid, height, width, make_vae, monkeypatch):
    """To rounding, which small norms enlarge (3e-13 was seen; with narrower halos it is 2e-10 and more), at sizes where
    tiles leave some of the frame out."""
    vae = make_vae(2).double()
    seeing_far(vae)
    latent = torch.randn(1, 16, 2, height, width).double()
    image = torch.rand(1, 3, 2, 8 * height, 8 * width).double() * 2 - 1
    expected = in_tiles(vae, latent, image, (1, 1), monkeypatch)
    for tiled, whole in zip(in_tiles(vae, latent, image, grid, monkeypatch), expected, strict=True):
        assert (tiled - whole).abs().max() <= 1e-11 * whole.abs().max()


def test_tiles_come_out_while_the_last_one_is_worked_on(make_vae, monkeypatch):
    vae, rise, worked_on = make_vae(2), vae_fused.Layers.rise, []
    monkeypatch.setattr(vae_fused, "decoder_grid", lambda *_: vae_tiles.Grid(1, 2, 1))
    monkeypatch.setattr(vae_fused.Layers, "rise", lambda *args: worked_on.append(1) or rise(*args))
    seen = [(part.shape[2], len(worked_on)) for part in vae_fused.decode(vae.decoder, torch.randn(1, 16, 3, 2, 34))]
    assert seen == [(1, 4), (4, 5), (4, 6)]


def test_halos_are_needed(make_vae, monkeypatch):
    """Narrower ones show in the test above's way."""
    vae = make_vae(2).double()
    seeing_far(vae)
    latent, image = torch.randn(1, 16, 1, 3, 40).double(), torch.rand(1, 3, 1, 24, 320).double() * 2 - 1
    expected = in_tiles(vae, latent, image, (1, 1), monkeypatch)
    monkeypatch.setattr(vae_tiles, "DECODER_HALO", vae_tiles.DECODER_HALO - 3)
    monkeypatch.setattr(vae_tiles, "ENCODER_HALO", vae_tiles.ENCODER_HALO - 3)
    for tiled, whole in zip(in_tiles(vae, latent, image, (1, 3), monkeypatch), expected, strict=True):
        assert (tiled - whole).abs().max() > 1e-11 * whole.abs().max()


def test_encodes_a_clip_in_tiles(make_vae, fused, relative_error, monkeypatch):
    vae, video = make_vae(2), torch.rand(2, 3, 9, 16, 240) * 2 - 1
    expected = vae.encode(video)
    fused()
    monkeypatch.setattr(vae_fused, "encoder_grid", lambda *_: vae_tiles.Grid(1, 2, 2))
    assert relative_error(vae.encode(video), expected) <= 1e-5


def test_tiles_come_from_memory():
    """Of 720p at base width 96: what a card of that much memory left gets."""
    decoder = WanVAE(96).decoder.to(torch.bfloat16)
    x = torch.empty(1, 21, 90, 160, 384, dtype=torch.bfloat16, device="meta")
    assert vae_fused.decoder_grid(decoder, x, 60 << 30) == vae_tiles.Grid(1, 1, 3)
    assert vae_fused.decoder_grid(decoder, x, 8 << 30) == vae_tiles.Grid(1, 1, 1)
    areas = []
    for budget in (6 << 30, 4 << 30, 3 << 30):
        grid = vae_fused.decoder_grid(decoder, x, budget)
        assert not grid.whole
        areas.append(max((y.stop - y.start) * (x.stop - x.start) for y, x in grid.tiles(90, 160, 13)))
    assert areas == sorted(areas, reverse=True)
    assert len(set(areas)) == 3


@pytest.mark.parametrize(("length", "count", "halo"), [(60, 3, 13), (7, 7, 2), (90, 1, 13)])
def test_spans_cover_an_axis_once(length, count, halo):
    line = torch.arange(length)
    parts = [line[span.read][span.crop()] for span in vae_tiles.spans(length, count, halo)]
    assert torch.equal(torch.cat(parts), line)
    for span in vae_tiles.spans(length, count, halo):
        assert torch.equal(line[span.kept()], line[span.read][span.crop()])
        assert span.start == max(0, span.keep_start - halo)
        assert span.stop == min(length, span.keep_stop + halo)


def test_serves_no_cpu_and_no_training(make_vae):
    assert not vae_fused.serves(torch.zeros(1), make_vae())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("latents", [1, 4])
def test_true_width_on_a_gpu(latents, make_vae, relative_error):
    """480p in bfloat16, against the modules in float32 with the same weights; those in bfloat16 are the yardstick."""
    vae = make_vae(96).bfloat16().float().cuda()
    latent = torch.randn(1, 16, latents, 60, 104, device="cuda")
    image = torch.rand(1, 3, 480, 832, device="cuda") * 2 - 1
    frames = 4 * latents - 3
    with torch.inference_mode():
        video = vae.decode(latent)
        expected = video, vae.encode_first_frame(image, frames), vae.encode(video.clamp(-1, 1))
        vae.bfloat16()
        assert vae_fused.serves(latent, vae)

        def results():
            return vae.decode(latent), vae.encode_first_frame(image, frames), vae.encode(video.clamp(-1, 1))

        ours = results()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vae_fused, "serves", lambda x, coder: False)
            plain = results()
    for fused, modules, exact in zip(ours, plain, expected, strict=True):
        error = relative_error(fused, exact)
        assert error <= 1.05 * relative_error(modules, exact)
        assert error <= 0.08
