"""umT5: recorded results of the official code, transformers' with the same weights, and what padding may not do."""

import pytest
import torch

from turbowan.checkpoints import load_text_encoder
from turbowan.models.text_encoder import TextEncoder

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
