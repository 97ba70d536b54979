"""What each stage takes besides weights, in bytes, from the structure of the networks.

The transformer's formula counts the tensors that live at the fullest points of a block. Tests run the real networks on
PyTorch's meta device and hold the formulas to what lives there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..media.transfer import IN_FLIGHT
from ..models import vae_tiles
from ..models.transformer import HEAD_SIZE, TransformerConfig
from ..models.vae import LATENT_CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, latent_frames
from ..models.vae_fused import LATENTS_AT_ONCE, MIDDLE_AT_ONCE, most_at_once
from ..specs import SIZE_STEP

TEXT_ROWS = 512
IMAGE_ROWS = 257  # CLIP tokens
WORKSPACE = 10**8  # of the libraries of products, and lists of selected blocks
GATHERED = 1 << 28  # numbers that plain PyTorch gathers for sparse attention: keys and values, see `ops`
PLAIN_TENSORS = 8  # [B, L, D] more in plain PyTorch's sparse-linear attention: copies by heads, both branches
PLAIN_UNITS = 8.2  # plain VAE layers, per frame of a chunk (measured: 4.6 GB for 832x480 in bfloat16, past included)
DEEP_UNITS = 7  # tensors of the VAE's middle that live at once: its input, a norm's result, q, k, v, two results
DEEP_WIDTH = 4  # times the base width


@dataclass(frozen=True)
class Work:
    """What a request asks of the networks.

    width, height: pixels. samples: videos made together. noises: drawn tensors, of the sampler. guided: with a second
    pass for the negative prompt. attention: "original", "sla" or "sagesla". itemsize: bytes of a number. eight_bit:
    linear layers read 8-bit rows. kernels: on a GPU, where operations and the VAE run fused. encodes_image: it starts
    from a picture.
    """

    width: int
    height: int
    frames: int
    samples: int = 1
    noises: int = 4
    guided: bool = False
    attention: str = "sla"
    itemsize: int = 2
    eight_bit: bool = True
    kernels: bool = True
    encodes_image: bool = False

    @property
    def tokens(self) -> int:
        """Of all samples."""
        frame = (self.height // SIZE_STEP) * (self.width // SIZE_STEP)
        return self.samples * latent_frames(self.frames) * frame

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return latent_frames(self.frames), self.height // SPATIAL_FACTOR, self.width // SPATIAL_FACTOR


def text_bytes(width: int, work: Work) -> int:
    """The text encoder on 512 rows a prompt: its hidden layer (2.5 times the width) three times, ten rows of its width,
    and scores of 64 columns a head in float32, three times."""
    prompts = work.samples + work.guided
    row = (3 * 2.5 + 10) * width * work.itemsize + 3 * 4 * TEXT_ROWS * max(1, width // 64)
    return WORKSPACE + int(prompts * TEXT_ROWS * row)


def token_bytes(config: TransformerConfig, work: Work) -> dict[str, int]:
    """What a block holds for each token where it holds most.

    With D and F the widths, d bytes a number and r bytes a number of the rows that linear layers read: always the
    stream (d D) and rows (r D).

    "attention": besides, q, k and v (3 d D), q and k rotated (2 d D), the result (d D), with SageSLA its codes (3 D).
    "projection": the attention's result (d D), its rows (r D, only in 8 bits) and what the projection makes (d D).
    "feed_forward": the hidden layer (d F), then its rows (r F, or d F if GELU is a pass of its own), or what comes out
    (d D).
    """
    d, width, hidden = work.itemsize, config.dim, config.ffn_dim
    r = 1 if work.eight_bit else d
    always = (d + r) * width
    attention = always + 6 * d * width
    if work.attention == "sagesla" and work.kernels:
        attention += 3 * width
    if work.attention != "original" and not work.kernels:
        attention += PLAIN_TENSORS * d * width
    projection = always + (2 * d + (r if work.eight_bit else 0)) * width
    apart = not work.kernels or d == 4
    after = r * hidden if work.eight_bit else (d * hidden if apart else 0)
    feed_forward = always + d * hidden + max(after, 0 if work.eight_bit else d * width)
    return {"attention": attention, "projection": projection, "feed_forward": feed_forward}


def denoise_bytes(config: TransformerConfig, work: Work, told: bool = True) -> int:
    """One evaluation of the transformer.

    Besides `token_bytes`, per token: the rotation's tables (512 bytes), the sampler's state, velocity and noises. And
    what every block makes of the text, unless (`told` is false) it does so anew each time, as streamed blocks do.
    """
    d, width = work.itemsize, config.dim
    gathered = 0
    if not work.kernels and work.attention != "original":
        gathered = min(GATHERED, 2 * work.tokens * width) * d
    latent = 4 * LATENT_CHANNELS * (4 * work.noises + 3 * 8 + 4 * 4)  # four positions a token; states are float64
    condition = 4 * (LATENT_CHANNELS + 4) * (4 + 4 + 2 + 4) if work.encodes_image else 0
    per_token = max(token_bytes(config, work).values()) + 4 * HEAD_SIZE + latent + condition
    rows = TEXT_ROWS + (IMAGE_ROWS if config.image_dim else 0)
    layers = config.num_layers if told else 1
    of_text = 2 * layers * rows * width * d * work.samples * (2 if work.guided else 1)
    return WORKSPACE + work.tokens * per_token + of_text + gathered


@dataclass(frozen=True)
class Coder:
    """A VAE's numbers. base: its width. weights: bytes."""

    base: int
    weights: int


def decode_fixed(coder: Coder, work: Work) -> int:
    """What decoding takes whatever its tiles: weights in the convolutions' layout, and the middle's result."""
    return WORKSPACE + coder.weights + _deep(coder, work)


def decode_bytes(coder: Coder, work: Work, grid: vae_tiles.Grid) -> int:
    """Decoding with these tiles and chunks, one sample or several small ones at a time."""
    middle = DEEP_UNITS * _deep(coder, work)
    return max(WORKSPACE + coder.weights + middle, decode_fixed(coder, work) + _rising(coder, work, grid))


def _rising(coder: Coder, work: Work, grid: vae_tiles.Grid) -> int:
    frames, height, width = work.latent
    number = vae_tiles.FULL * coder.base * work.itemsize
    units = vae_tiles.DECODER_UNITS if work.kernels else PLAIN_UNITS
    area = _largest(grid, height, width, vae_tiles.DECODER_HALO)
    per_latent, past = TEMPORAL_FACTOR * units * number, vae_tiles.DECODER_PAST * number
    video = 0 if grid.whole else 4 * 3 * vae_tiles.FULL * height * width * TEMPORAL_FACTOR * frames
    return vae_tiles.work_bytes(area, grid.latents, per_latent, past) + video + piece_bytes(work, grid)


def piece_bytes(work: Work, grid: vae_tiles.Grid) -> int:
    """Frames of a chunk in float32, four of them on their way to bytes, and bytes on their way to the host."""
    _, height, width = work.latent
    one = 3 * vae_tiles.FULL * height * width * TEMPORAL_FACTOR
    return 4 * one * (grid.latents + 3) + one * IN_FLIGHT


def _largest(grid: vae_tiles.Grid, height: int, width: int, halo: int) -> int:
    """Positions of the largest tile."""
    rows, columns = (
        max(span.stop - span.start for span in vae_tiles.spans(length, count, halo))
        for length, count in ((height, grid.rows), (width, grid.columns))
    )
    return rows * columns


def _deep(coder: Coder, work: Work) -> int:
    frames, height, width = work.latent
    return min(frames, MIDDLE_AT_ONCE) * height * width * DEEP_WIDTH * coder.base * work.itemsize


def decode_grids(coder: Coder, work: Work) -> tuple[vae_tiles.Grid, vae_tiles.Grid]:
    """The chunks that are fastest, and the least that keeps frames whole."""
    frames, height, width = work.latent
    if not work.kernels:
        return vae_tiles.Grid(1, 1, 1), vae_tiles.Grid(1, 1, 1)
    most = min(frames, most_at_once(1, height, width, 2 * coder.base), LATENTS_AT_ONCE)
    return vae_tiles.Grid(1, 1, most), vae_tiles.Grid(1, 1, 1)


def decode_grid(coder: Coder, work: Work, budget: int) -> vae_tiles.Grid:
    """What the VAE chooses with so many bytes for its later layers, as `vae_fused.decoder_grid` does."""
    frames, height, width = work.latent
    number = vae_tiles.FULL * coder.base * work.itemsize
    per_latent, past = TEMPORAL_FACTOR * vae_tiles.DECODER_UNITS * number, vae_tiles.DECODER_PAST * number
    most = decode_grids(coder, work)[0].latents
    grid = vae_tiles.choose(budget, height, width, vae_tiles.DECODER_HALO, most, per_latent, past)
    if grid.whole:
        return grid
    budget -= 4 * 3 * vae_tiles.FULL * height * width * TEMPORAL_FACTOR * frames
    return vae_tiles.choose(budget, height, width, vae_tiles.DECODER_HALO, 1, per_latent, past)


def encode_bytes(coder: Coder, work: Work, budget: int | None = None) -> int:
    """Encoding one picture as the first frame of a clip; in tiles where the budget for the first layers is small."""
    _, height, width = work.latent
    number = vae_tiles.FULL * coder.base * work.itemsize
    units = vae_tiles.ENCODER_UNITS if work.kernels else PLAIN_UNITS
    per_position = vae_tiles.STEADY_FRAMES * units * number
    area = height * width
    if budget is not None and work.kernels:
        grid = vae_tiles.choose(budget, height, width, vae_tiles.ENCODER_HALO, 1, per_position, 0)
        area = _largest(grid, height, width, vae_tiles.ENCODER_HALO)
    return encode_fixed(coder, work) + vae_tiles.work_bytes(area, 1, per_position, 0)


def encode_fixed(coder: Coder, work: Work) -> int:
    """What encoding takes whatever its tiles: weights, the picture and a black frame, the middle."""
    _, height, width = work.latent
    deep = DEEP_UNITS * vae_tiles.STEADY_FRAMES * height * width * DEEP_WIDTH * coder.base * work.itemsize // 4
    picture = 3 * 4 * 3 * vae_tiles.FULL * height * width
    return WORKSPACE + coder.weights + deep + picture
