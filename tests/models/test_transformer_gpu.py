"""A whole step on a GPU, in every precision: no waiting, the same bits each time; its block compiles in one piece."""

import pytest
import torch

from turbowan.bench.host import waits
from turbowan.models.pack import prepare
from turbowan.models.transformer import AttentionConfig, Context
from turbowan.ops.rows import FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_seed"),
]


@pytest.fixture
def on_gpu(make_transformer):
    """A two-layer transformer in bfloat16, ready for inference with its linear layers in a format."""

    def make(format, kind):
        net = make_transformer(AttentionConfig(kind, 0.3), ffn_dim=640).to("cuda", torch.bfloat16)
        prepare(net, format)
        return net

    return make


@pytest.mark.parametrize("kind", ["sla", "sagesla"])
@pytest.mark.parametrize("format", FORMATS)
@torch.inference_mode()
def test_a_step_never_waits_and_never_differs(format, kind, on_gpu):
    net = on_gpu(format, kind)
    latent = torch.randn(2, 16, 5, 30, 52, device="cuda")  # 1950 tokens: ragged in every block
    time = torch.tensor([937.5, 412.0], device="cuda")
    context = net.tell(torch.randn(2, 20, 48, device="cuda"), text_rows=512)
    first = net(latent, time, context)
    assert first.isfinite().all()
    assert waits(lambda: net(latent, time, context)) is False
    for _ in range(100):
        assert torch.equal(net(latent, time, context), first)


@pytest.mark.parametrize(
    ("format", "kind"), [("bf16", "sla"), ("int8_row", "sla"), ("fp8_row", "sagesla"), ("int8_block", "sagesla")]
)
@torch.no_grad()
def test_a_compiled_block_gives_the_same(format, kind, on_gpu, relative_error):
    torch._dynamo.reset()
    net = on_gpu(format, kind)
    block, how = net.blocks[0], AttentionConfig(kind, 0.3)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    stream = [draw(2, 990, 256), draw(2, 990, 256), torch.randn(2, 1, 256, device="cuda")]
    modulation, rotation = torch.randn(2, 6, 256, device="cuda"), net._rotation((9, 10, 11), stream[0].device)
    args = (modulation, rotation, Context(draw(2, 9, 256), None, 504), None, how, "exact")
    expected = block(list(stream), *args)
    for ours, theirs in zip(torch.compile(block, fullgraph=True)(list(stream), *args), expected, strict=True):
        assert relative_error(ours, theirs) <= 5e-3
