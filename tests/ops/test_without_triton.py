"""Where Triton is not installed (Windows, macOS) everything imports and runs in plain PyTorch, and says so."""

import os
import subprocess
import sys
import textwrap

SCRIPT = """
    import sys
    import warnings
    from importlib.machinery import PathFinder

    class WithoutTriton:
        def find_spec(self, name, path=None, target=None):
            return None if name.partition(".")[0] == "triton" else PathFinder.find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton()

    import torch
    from turbowan import ops
    from turbowan.errors import Note
    from turbowan.ops import registry
    from turbowan.models.transformer import AttentionConfig, TransformerConfig, WanTransformer
    from turbowan.models.pack import join_qkv, round_linears

    torch.manual_seed(0)
    net = WanTransformer(TransformerConfig(128, 256, 2, 24, has_sla=True), AttentionConfig("sla", 0.5, 64, 64)).eval()
    round_linears(net, "int8_row")
    join_qkv(net)
    with torch.no_grad():
        out = net(torch.randn(2, 16, 2, 12, 10), torch.tensor([900.0, 300.0]), torch.randn(2, 3, 24))
    assert out.isfinite().all()
    facts = ops.Facts("cuda", torch.bfloat16, 128, (9, 0))
    for name, choice in ops.explain(facts).items():
        assert choice.implementation.name != "triton", name
    refused = dict(ops.explain(facts)["sparse_linear_attention"].refused)
    assert refused["triton"] == "needs the package triton, which is not installed", refused
    registry._installed = lambda package: package != "triton"  # NVIDIA's attention runs between two kernels of ours
    for capability in ((9, 0), (12, 0)):
        choice = ops.explain(ops.Facts("cuda", torch.bfloat16, 128, capability))["sparse_linear_attention"]
        assert choice.implementation.name == "eager"
        assert ("cudnn", "needs the package triton, which is not installed") in choice.refused, choice.refused
    with warnings.catch_warnings(record=True) as caught:  # as on a GPU, in whose place the CPU computes
        warnings.simplefilter("always")
        registry.Facts.of = lambda x, head_size=None: ops.Facts("cuda", torch.bfloat16, head_size, (9, 0))
        for name in ("rms_norm", "gelu_rows"):
            ops.OPERATIONS[name]._chosen.clear()
        for x in torch.randn(2, 2, 5, 64), torch.randn(2, 5, 32), torch.randn(1, 3, 48):
            ops.rms_norm(x, torch.ones(x.shape[-1]))
            ops.gelu_rows(x.flatten(0, -2))
    reason = "our kernel needs the package triton, which is not installed"
    assert [str(w.message) for w in caught] == [f"rms_norm runs in plain PyTorch, slowly: {reason}"], caught
    assert caught[0].category is Note
    assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
"""


def test_everything_runs_in_plain_pytorch():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True, text=True, timeout=120, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
