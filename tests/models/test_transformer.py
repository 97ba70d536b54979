"""The transformer: recorded outputs of the official code, and what must hold for any weights."""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from turbowan import ops
from turbowan.checkpoints import load_transformer
from turbowan.errors import RequestError
from turbowan.models.linear import ScaledLinear
from turbowan.models.pack import file_format, prepare
from turbowan.models.transformer import ATTENTION_KINDS, AttentionConfig, Context, patchify, settled, unpatchify

TEXT_ROWS = 512


def inputs(batch=1, frames=3, height=12, width=10, rows=20, text_dim=48, channels=16):
    return (
        torch.randn(batch, channels, frames, height, width),
        torch.rand(batch) * 1000,
        torch.randn(batch, rows, text_dim),
    )


# --- recorded ---------------------------------------------------------------------------------------------------------


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])


def official(path, device, **options):
    """A recorded network: in float32 on a CPU, on a GPU as the engine runs it."""
    net = load_transformer(path, device, torch.bfloat16 if device == "cuda" else torch.float32, **options)
    prepare(net, file_format(net))
    return net


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(("suffix", "linear", "bar"), [("", "bf16", 0.008), ("-quant", "int8", 0.012)])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_recorded_outputs(kind, suffix, linear, bar, device, golden, recorded, relative_error):
    x, context, expected = recorded("t2v-tiny.io.safetensors", "x", "context", f"out.{kind}.{linear}")
    blocks = {"block_q": 64, "block_k": 128} if kind == "sagesla" else {}
    path = golden(f"t2v-tiny{suffix}.pth")
    net = official(path, device, attention=kind, sla_topk=0.25, norms="official", **blocks)
    timestep = torch.tensor([937.5], device=device).bfloat16().float()  # 936, as it was recorded
    with torch.inference_mode():
        ours = net(x.to(device, torch.float32), timestep, context.to(device, torch.float32))
    assert ours.dtype == torch.float32
    assert relative_error(ours.cpu(), expected) <= bar


def test_recorded_attention_kinds_differ(golden, recorded, relative_error):
    """Or the test above could not tell one kind from another."""
    x, context, expected = recorded("t2v-tiny.io.safetensors", "x", "context", "out.original.int8")
    net = load_transformer(golden("t2v-tiny-quant.pth"), attention="sla", sla_topk=0.25)
    assert relative_error(net(x.float(), torch.tensor([936.0]), context.float()), expected) > 0.04


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(("norms", "name"), [("exact", "default_norm"), ("official", "fast_norm")])
def test_recorded_width_that_is_no_power_of_two(norms, name, device, golden, recorded, relative_error):
    x, context, expected = recorded("t2v-384.io.safetensors", "x", "context", f"out.sla.{name}")
    net = official(golden("t2v-384.pth"), device, attention="sla", sla_topk=0.4, norms=norms)
    timestep = torch.tensor([620.0], device=device)
    with torch.inference_mode():
        ours = net(x.to(device, torch.float32), timestep, context.to(device, torch.float32))
    assert relative_error(ours.cpu(), expected) <= 0.011


# --- layout -----------------------------------------------------------------------------------------------------------


def test_patches_are_t_major_and_features_channel_major():
    x = torch.randn(2, 5, 3, 4, 6)
    tokens = patchify(x)
    assert tokens.shape == (2, 3 * 2 * 3, 5 * 4)
    for t, h, w, c, i, j in itertools.product(range(3), range(2), range(3), range(5), range(2), range(2)):
        assert torch.equal(tokens[:, (t * 2 + h) * 3 + w, (c * 2 + i) * 2 + j], x[:, c, t, 2 * h + i, 2 * w + j])


def test_unpatchify_has_the_channel_last():
    tokens = torch.randn(2, 3 * 2 * 3, 4 * 5)
    x = unpatchify(tokens, (3, 2, 3))
    assert x.shape == (2, 5, 3, 4, 6)
    for t, h, w, c, i, j in itertools.product(range(3), range(2), range(3), range(5), range(2), range(2)):
        assert torch.equal(x[:, c, t, 2 * h + i, 2 * w + j], tokens[:, (t * 2 + h) * 3 + w, (i * 2 + j) * 5 + c])


# --- equalities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_batch_equals_singles(kind, make_transformer, relative_error):
    """Samples that differ in latent, time and text do not see each other (of SageSLA's codes, one may flip)."""
    net, bar = make_transformer(AttentionConfig(kind, 0.4, 64, 64)), 2e-3 if kind == "sagesla" else 1e-5
    batch = inputs(batch=3)
    whole = net(*batch)
    for i in range(3):
        assert relative_error(whole[i : i + 1], net(*(x[i : i + 1] for x in batch))) <= bar


@pytest.mark.parametrize("given", [1, 21, 511])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_text_rows_equal_the_full_text(given, dtype, bar, make_transformer, relative_error):
    """The zero rows after a prompt are attended to; one of them counted 512 - n times is the same."""
    net = make_transformer(AttentionConfig("original")).to(dtype)
    latent, timestep, text = inputs(batch=2, rows=given)
    text[:, -1] = 0
    full = torch.cat([text, torch.zeros(2, TEXT_ROWS - given, 48)], dim=1)
    expected = net(latent, timestep, full)
    assert relative_error(net(latent, timestep, text, text_rows=TEXT_ROWS), expected) <= bar
    assert relative_error(net(latent, timestep, full, text_rows=TEXT_ROWS), expected) == 0
    if given == 21:
        assert relative_error(net(latent, timestep, text), expected) > 1e-3  # the padding does count


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 2, 6), (2, 26, 2), (5, 6, 10), (3, 14, 18)])
@pytest.mark.parametrize("blocks", [(128, 64), (64, 128), (64, 64)])
def test_sla_over_all_blocks_is_dense_on_any_grid(grid, blocks, make_transformer, relative_error):
    """From one token up, lengths that fit no block: with every block kept and an idle projection SLA is dense."""
    net = make_transformer(AttentionConfig("sla", 1.0, *blocks))
    for block in net.blocks:
        nn.init.zeros_(block.self_attn.proj_l.weight)
        nn.init.zeros_(block.self_attn.proj_l.bias)
    given = inputs(2, *grid)
    ours = net(*given)
    assert ours.shape == given[0].shape
    net.attention = AttentionConfig("original")
    assert relative_error(ours, net(*given)) <= 1e-5


def test_the_projection_adds_the_linear_branch(make_transformer, relative_error):
    net = make_transformer(AttentionConfig("sla", 1.0))
    given = inputs()
    sla = net(*given)
    net.attention = AttentionConfig("original")
    assert relative_error(sla, net(*given)) > 1e-2


def test_dense_attention_where_there_is_no_projection(make_transformer):
    net = make_transformer(has_sla=False)
    assert net.attention.kind == "original"
    assert not any("proj_l" in name for name in net.state_dict())
    net(*inputs())


def test_norms_differ_at_widths_that_are_no_power_of_two(make_transformer, relative_error):
    for dim, same in ((256, True), (384, False)):
        net, given = make_transformer(AttentionConfig("original"), dim=dim), inputs()
        net.patch_embedding.bias.add_(1.0)  # tokens whose mean is far from 0
        exact = net(*given)
        net.norms = "official"
        error = relative_error(net(*given), exact)
        assert (error == 0) if same else (1e-4 < error < 0.5)


def test_rounds_none_of_its_inputs(make_transformer):
    """bfloat16 would take 937.5 for 936, and these two latents for one."""
    net = make_transformer()
    latent, timestep, text = inputs()
    out = net(latent, timestep, text)
    assert not torch.equal(net(latent, timestep + 0.01, text), out)
    assert not torch.equal(net(latent * (1 + 1e-5), timestep, text), out)
    assert not torch.equal(net(latent, timestep, text * (1 + 1e-5)), out)


def test_bfloat16_is_near_float32(make_transformer, relative_error):
    net, given = make_transformer(AttentionConfig("original")), inputs()
    expected = net(*given)
    ours = net.to(torch.bfloat16)(*given)
    assert ours.dtype == torch.float32
    assert 1e-4 < relative_error(ours, expected) < 0.03


def test_leaves_its_inputs_alone(make_transformer):
    net, given = make_transformer(in_dim=36), inputs()
    condition = torch.randn(1, 20, *given[0].shape[2:])
    before = [x.clone() for x in (*given, condition)]
    net(*given, condition)
    assert all(torch.equal(a, b) for a, b in zip(before, (*given, condition), strict=True))


def test_condition_is_read_after_the_latent(make_transformer, relative_error):
    """Swapping the weights of two channels and the channels themselves changes nothing: 16 is the condition's first."""
    net, given = make_transformer(in_dim=36), inputs(batch=2)
    condition = torch.randn(2, 20, *given[0].shape[2:])
    expected = net(*given, condition)
    order = [16, *range(1, 16), 0, *range(17, 36)]
    weight = net.patch_embedding.weight
    weight.copy_(weight.unflatten(1, (36, 4))[:, order].flatten(1))
    both = torch.cat([given[0], condition], dim=1)[:, order]
    assert relative_error(net(both[:, :16], *given[1:], both[:, 16:]), expected) <= 1e-5


def test_a_layer_outside_the_blocks_may_be_in_float8(make_transformer, relative_error):
    """Some files hold all their matrices so; the time's layers then need their scale, and the residual its dtype."""
    net, given = make_transformer(), inputs()
    expected = net(*given)
    time = ("time_embedding.0", "time_embedding.2", "time_projection.1")
    for name in ("patch_embedding", *time, "text_embedding.0", "head.head"):
        layer = net.get_submodule(name)
        small = ScaledLinear(layer.in_features, layer.out_features)
        small.scale_weight.copy_(layer.weight.abs().max() / 448)
        small.weight.copy_((layer.weight / small.scale_weight).to(torch.float8_e4m3fn))
        small.bias.copy_(layer.bias)
        net.set_submodule(name, small)
    assert net.dtype == torch.float32
    assert relative_error(net(*given), expected) < 0.1


@pytest.mark.parametrize("norms", ["exact", "official"])
def test_a_block_is_its_written_formula(norms, make_transformer, relative_error):
    """In float64 and plain PyTorch: modulated norms, rotation, gates, text and image tokens, feed-forward."""
    dim, length = 384, 30
    block = make_transformer(dim=dim, has_sla=False, image_dim=24, norms=norms).blocks[0]
    x, text, image = torch.randn(2, length, dim) + 2, torch.randn(2, 9, dim), torch.randn(2, 5, dim)
    modulation, rotation = torch.randn(2, 6, dim), ops.rope_table(3, 2, 5, 128)
    how = AttentionConfig("original")
    ours = settled(*block([x, None, None], modulation, rotation, Context(text, image, 7), None, how, norms))

    wide = copy.deepcopy(block).double()

    def norm(h):
        centred = h - h.mean(dim=-1, keepdim=True)
        extra = (512 - dim) / dim * h.mean(dim=-1, keepdim=True).square() if norms == "official" else 0
        return centred / (centred.square().mean(dim=-1, keepdim=True) + extra + 1e-6).sqrt()

    def rms(layer, h):
        return h / (h.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    def heads(h):
        return h.unflatten(-1, (3, 128)).transpose(1, 2)

    def attend(q, k, v):
        return ((heads(q) @ heads(k).mT / 128**0.5).softmax(dim=-1) @ heads(v)).transpose(1, 2).flatten(2)

    def rotate(h):
        turn = torch.complex(*(part.double() for part in rotation))
        pairs = torch.view_as_complex(h.unflatten(-1, (3, 64, 2)))
        return torch.view_as_real(pairs * turn[:, None]).flatten(-3)

    h, text, image = x.double(), text.double(), image.double()
    text = torch.cat([text, text[:, -1:].expand(-1, 6, -1)], dim=1)  # the last row seven times
    m = (wide.modulation + modulation.double()).unsqueeze(2).unbind(1)
    own, cross = wide.self_attn, wide.cross_attn
    a = norm(h) * (1 + m[1]) + m[0]
    q, k = (rotate(rms(n, layer(a))) for n, layer in ((own.norm_q, own.q), (own.norm_k, own.k)))
    h = h + own.o(attend(q, k, own.v(a))) * m[2]
    q = rms(cross.norm_q, cross.q(norm(h) * wide.norm3.weight + wide.norm3.bias))
    mixed = attend(q, rms(cross.norm_k, cross.k(text)), cross.v(text))
    h = h + cross.o(mixed + attend(q, rms(cross.norm_k_img, cross.k_img(image)), cross.v_img(image)))
    f = wide.ffn[0](norm(h) * (1 + m[4]) + m[3])
    gelu = 0.5 * f * (1 + torch.tanh((2 / math.pi) ** 0.5 * (f + 0.044715 * f**3)))
    h = h + wide.ffn[2](gelu) * m[5]
    assert relative_error(ours, h) <= 1e-5


@pytest.mark.parametrize(("in_dim", "image_dim"), [(16, None), (36, 24)])
def test_what_a_request_tells_is_embedded_once(in_dim, image_dim, make_transformer):
    """Keys and values made before the steps give exactly what each step would have made of the text."""
    net = make_transformer(in_dim=in_dim, image_dim=image_dim)
    latent, timestep, text = inputs(batch=2)
    condition = torch.randn(2, 20, *latent.shape[2:]) if in_dim == 36 else None
    tokens = None if image_dim is None else torch.randn(2, 5, image_dim)
    told = net.tell(text, tokens, text_rows=text.shape[1] + 6)
    expected = net(latent, timestep, text, condition, tokens, text_rows=text.shape[1] + 6)
    assert torch.equal(net(latent, timestep, told, condition), expected)
    assert len(told.blocks) == len(net.blocks)


# --- gradients, tangents, compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["original", "sla"])
def test_every_parameter_gets_a_gradient(kind, make_transformer):
    net = make_transformer(AttentionConfig(kind, 0.3, 64, 64), image_dim=24, in_dim=36).requires_grad_()
    latent, timestep, text = inputs(batch=2)
    condition, tokens = torch.randn(2, 20, *latent.shape[2:]), torch.randn(2, 7, 24)
    net(latent, timestep, text, condition, tokens).square().mean().backward()
    for name, parameter in net.named_parameters():
        if kind == "original" and "proj_l" in name:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["original", "sla"])
def test_tangent_is_the_difference_along_a_path(kind, make_transformer):
    """Forward-mode through the whole network, in latent and time, as consistency training takes it."""
    net = make_transformer(AttentionConfig(kind, 1.0, 64, 64))
    latent, timestep, text = inputs(batch=2)
    direction = torch.randn_like(latent), torch.ones(2)
    _, tangent = torch.func.jvp(lambda x, t: net(x, t, text), (latent, timestep), direction)
    step = 1e-2
    ahead, behind = (net(latent + s * direction[0], timestep + s * direction[1], text) for s in (step, -step))
    assert ((ahead - behind) / (2 * step) - tangent).norm() <= 2e-2 * tangent.norm()


def test_gradients_after_inference_mode(make_transformer):
    """What a generation leaves behind (the rotation table) must not stop later training."""
    net, given = make_transformer(), inputs()
    with torch.inference_mode():
        net(*given)
    net.requires_grad_()
    net(*given).sum().backward()


@pytest.mark.parametrize(
    ("kind", "training"),
    [("original", False), ("sla", False), ("sagesla", False), ("original", True), ("sla", True)],
)
def test_a_block_compiles_in_one_piece(kind, training, make_transformer):
    torch._dynamo.reset()
    net = make_transformer().requires_grad_(training)
    block, how = net.blocks[0], AttentionConfig(kind, 0.4, 64, 64)
    x, modulation, text = torch.randn(2, 90, 256), torch.randn(2, 6, 256), torch.randn(2, 9, 256)
    rotation = ops.rope_table(3, 5, 6, 128)
    stream, context = [x, torch.randn_like(x), torch.randn(2, 1, 256)], Context(text, None, 504)
    args = (modulation, rotation, context, None, how, "official")
    expected = block(list(stream), *args)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    ours = compiled(list(stream), *args)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    if training:
        weights = list(block.self_attn.parameters())
        losses = [x.square().sum() + delta.square().sum() for x, delta, _ in (ours, expected)]
        grads = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


def test_autocast_leaves_time_and_head_in_float32(make_transformer, relative_error):
    net, given = make_transformer(), inputs()
    expected = net(*given)
    with torch.autocast("cpu", torch.bfloat16):
        ours = net(*given)
    assert ours.dtype == torch.float32
    assert 1e-5 < relative_error(ours, expected) < 0.05


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refuses_shapes_that_do_not_fit(make_transformer):
    text_to_video, image_to_video = make_transformer(), make_transformer(in_dim=36)
    with_tokens = make_transformer(in_dim=36, image_dim=24)
    latent, timestep, text = inputs(batch=2)
    condition = torch.randn(2, 20, *latent.shape[2:])

    def refuses(net, *args, line):
        with pytest.raises(RequestError, match=line):
            net(*args)

    refuses(text_to_video, latent, timestep, text, condition, line=r"16 channels \(16 latent \+ 0 condition\), got 36")
    refuses(image_to_video, latent, timestep, text, line=r"36 channels \(16 latent \+ 20 condition\), got 16")
    refuses(text_to_video, latent[:, :, :, 1:], timestep, text, line="height and width must be even, got 11x10")
    refuses(text_to_video, latent[..., 1:], timestep, text, line="height and width must be even, got 12x9")
    refuses(text_to_video, latent, timestep, text[..., 1:], line="text of width 48, got 47")
    refuses(image_to_video, latent, timestep, text, condition[:, :, 1:], line="got 2x12x10 and 3x12x10")
    refuses(with_tokens, latent, timestep, text, condition, line="image tokens of width 24, got none")
    refuses(with_tokens, latent, timestep, text, condition, torch.randn(2, 5, 20), line="width 24, got width 20")
    refuses(image_to_video, latent, timestep, text, condition, torch.randn(2, 5, 24), line="takes no image tokens")
    refuses(text_to_video, latent, timestep[:1], text, line="the latent's 2 samples, got .*'timestep': 1")
    refuses(text_to_video, latent, timestep, text[:1], line="the latent's 2 samples, got .*'text': 1")
    refuses(text_to_video, latent, timestep[0], text, line="the latent's 2 samples, got .*'timestep': 0")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kind": "flash"}, "attention must be one of auto, original, sla, sagesla, got 'flash'"),
        ({"top_k": 0.0}, r"sla_topk must be in \(0, 1\], got 0.0"),
        ({"top_k": 1.1}, r"sla_topk must be in \(0, 1\], got 1.1"),
        ({"block_q": 0}, "blocks must be positive, got 0 x 64"),
    ],
)
def test_attention_config_refuses(settings, line):
    with pytest.raises(RequestError, match=line):
        AttentionConfig(**settings)


def test_threads_may_ask_for_different_sizes(make_transformer, monkeypatch):
    """Each gets the tables of its own grid, also where another one's come in between."""
    net, cpu = make_transformer(), torch.device("cpu")
    (one, other), plain = [(1, 2, 2), (2, 1, 3)], torch.inference_mode

    @contextmanager
    def interrupted(mode):
        with plain(mode):
            yield
        if mode is False and interruptions:
            with ThreadPoolExecutor(1) as pool:
                theirs.append(pool.submit(net._rotation, *interruptions.pop()).result())

    interruptions, theirs = [(other, cpu)], []
    monkeypatch.setattr(torch, "inference_mode", interrupted)
    ours = net._rotation(one, cpu)
    monkeypatch.undo()
    for found, grid in ((ours, one), (theirs[0], other)):
        assert all(map(torch.equal, found, ops.rope_table(*grid, 128, cpu)))
