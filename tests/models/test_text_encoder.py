"""umT5: recorded results of the official code, transformers' with the same weights, and what padding may not do."""

import pytest
import torch

from turbowan.checkpoints import load_text_encoder
from turbowan.checkpoints.files import write_tensors
from turbowan.models.linear import ScaledLinear
from turbowan.models.text_encoder import TextEncoder, position_buckets

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.fixture
def encoder():
    net = TextEncoder(vocabulary=300, width=64, layers=2, heads=4, head_width=16, hidden=96).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return net.requires_grad_(False)


def prompts(*lengths, rows=512):
    ids, mask = torch.zeros(len(lengths), rows, dtype=torch.int64), torch.zeros(len(lengths), rows, dtype=torch.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = torch.randint(1, 300, (length,))
        mask[i, :length] = 1
    return ids, mask


def test_recorded_embeddings(golden, recorded, relative_error):
    ids, mask, out = recorded("t5.io.safetensors", "ids", "mask", "out")
    ours = load_text_encoder(golden("t5.pth"))(ids, mask)
    assert relative_error(ours[mask == 1], out[mask == 1]) <= 1e-4
    assert not ours[mask == 0].any()


def test_equals_transformers(tmp_path, relative_error):
    """From the folder that transformers writes, whole 512 rows."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    peer = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    peer.save_pretrained(tmp_path / "text_encoder")
    ids, mask = prompts(7, 512, 130)
    with torch.no_grad():
        expected = peer(input_ids=ids, attention_mask=mask).last_hidden_state
    ours = load_text_encoder(tmp_path / "text_encoder")(ids, mask)
    assert ours.shape == (3, 512, 64)
    assert relative_error(ours[mask == 1], expected[mask == 1]) <= 1e-5


def test_padding_changes_nothing_and_is_zero(encoder, relative_error):
    ids, mask = prompts(5, 60, rows=80)
    out = encoder(ids, mask)
    assert not out[mask == 0].any()
    other = torch.where(mask == 1, ids, torch.randint(1, 300, ids.shape))
    assert torch.equal(encoder(other, mask), out)
    assert relative_error(encoder(ids[:1, :5], mask[:1, :5]), out[:1, :5]) <= 1e-5


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_trimmed_equals_512_rows(encoder, relative_error, dtype, bar):
    """Each prompt alone in its own length, without a mask, as the engine reads it; a batch of three without one."""
    encoder = encoder.to(dtype)
    lengths = (1, 60, 512)
    ids, mask = prompts(*lengths)
    whole = encoder(ids, mask)
    for i, length in enumerate(lengths):
        assert relative_error(encoder(ids[i : i + 1, :length]), whole[i : i + 1, :length]) <= bar
    full = ids[:, :1].expand(3, 9).contiguous()
    assert relative_error(encoder(full), encoder(full, torch.ones_like(full))) <= 1e-6


def test_buckets_are_those_of_transformers():
    from transformers import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    theirs = UMT5Attention(UMT5Config(), has_relative_attention_bias=True, layer_idx=0)
    place = torch.arange(512)
    assert torch.equal(position_buckets(512), theirs._relative_position_bucket(place[None] - place[:, None]))


def test_float16_stays_finite(encoder):
    encoder = encoder.to(torch.float16)
    for layer in encoder.model.encoder.block:
        layer.layer[1].DenseReluDense.wo.weight.mul_(3e4)
    assert encoder(*prompts(7, rows=9)).isfinite().all()


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_8_bit_weights_stay_so(codes, encoder, tmp_path, relative_error):
    """They give what their expanded values give, in float32; in a file one scale a row (int8) or one (float8)."""
    plain, eight = {}, {}
    for key, value in encoder.model.state_dict().items():
        plain[key] = eight[key] = value
        if value.ndim == 2 and ".block." in key and "bias" not in key:
            top = 127 if codes == torch.int8 else 448
            scale = value.abs().amax(dim=1, keepdim=True) / top
            scale = scale if codes == torch.int8 else scale.max().reshape(1)
            eight[key] = (value / scale).round().to(codes) if codes == torch.int8 else (value / scale).to(codes)
            eight[f"{key.removesuffix('weight')}{'weight_scale' if codes == torch.int8 else 'scale_weight'}"] = scale
            plain[key] = eight[key].float() * scale
    write_tensors(tmp_path / "plain.safetensors", plain)
    write_tensors(tmp_path / "eight.safetensors", eight)
    ours, expected = (load_text_encoder(tmp_path / f"{name}.safetensors") for name in ("eight", "plain"))
    held = [module for module in ours.modules() if isinstance(module, ScaledLinear)]
    assert len(held) == 14
    assert {module.weight.dtype for module in held} == {codes}
    for length in (5, 200):  # fewer rows than the layers are wide, and more
        ids = torch.randint(1, 300, (1, length))
        assert relative_error(ours(ids), expected(ids)) <= 1e-5
    half = load_text_encoder(tmp_path / "eight.safetensors", dtype=torch.bfloat16)
    assert relative_error(half(ids), expected(ids)) <= 3e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_nothing_waits(encoder, dtype, relative_error):
    ids = torch.randint(1, 300, (1, 60))
    expected = encoder(ids)
    there, on_gpu = encoder.to("cuda", dtype), ids.cuda()
    there(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = there(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(out.float().cpu(), expected) <= 3e-2


def test_batch_equals_singles(encoder, relative_error):
    ids, mask = prompts(3, 40, 17, rows=64)
    whole = encoder(ids, mask)
    for i in range(3):
        assert relative_error(whole[i : i + 1], encoder(ids[i : i + 1], mask[i : i + 1])) <= 1e-5


def test_word_order_counts(encoder):
    ids, mask = prompts(9, rows=16)
    turned = ids.clone()
    turned[:, :9] = ids[:, :9].flip(1)
    assert not torch.allclose(encoder(ids, mask)[:, :9], encoder(turned, mask)[:, :9].flip(1), atol=1e-3)


def test_width_is_the_embeddings(encoder):
    assert encoder.width == 64
    assert encoder(*prompts(4, rows=8)).shape == (1, 8, 64)
