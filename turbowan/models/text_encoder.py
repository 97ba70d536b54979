"""The umT5 encoder, through `transformers`, in the form Wan uses it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5DenseGatedActDense, UMT5LayerFF


class FeedForward(nn.Module):
    """umT5's gated layer, without the stock one's cast to the dtype of `wo`'s weight: in 8-bit files that is no dtype
    to compute in."""

    def __init__(self, stock: UMT5DenseGatedActDense) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = stock.wi_0, stock.wi_1, stock.wo, stock.act

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


class TextEncoder(nn.Module):
    """umT5 with the rows past the prompt set to zero.

    Args:
        vocabulary, width, layers, heads, head_width, hidden: sizes; 256384, 4096, 24, 64, 64 and 10240 in umT5-xxl.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=head_width,
            d_ff=hidden,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
        )
        self.model = UMT5EncoderModel(config)
        for layer in list(self.model.modules()):
            if isinstance(layer, UMT5LayerFF):
                layer.add_module("DenseReluDense", FeedForward(layer.DenseReluDense))

    @property
    def width(self) -> int:
        return self.model.config.d_model

    @property
    def blocks(self) -> nn.ModuleList:
        """In the order they run."""
        return self.model.encoder.block  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids to embeddings.

        Args:
            ids: int64 [B, L]. mask: [B, L], 1 at the prompt's tokens.

        Returns:
            [B, L, D] in the weights' dtype; rows where the mask is 0 are zero.
        """
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)


