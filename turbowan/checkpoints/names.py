"""The names each family gives the same tensors, as pairs of patterns.

Our own names are those of the official Wan files, with SLA's projection as `blocks.N.self_attn.proj_l`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .files import State

Pairs = Sequence[tuple[str, str]]

OFFICIAL_PROJ = "self_attn.attn_op.local_attn.proj_l"

# (ours, theirs); `{n}` stands for a number
DIFFUSERS_TRANSFORMER: Pairs = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("blocks.{n}.self_attn.proj_l.", "blocks.{n}.attn1.attn_op.local_attn.proj_l."),
    ("blocks.{n}.self_attn.q.", "blocks.{n}.attn1.to_q."),
    ("blocks.{n}.self_attn.k.", "blocks.{n}.attn1.to_k."),
    ("blocks.{n}.self_attn.v.", "blocks.{n}.attn1.to_v."),
    ("blocks.{n}.self_attn.o.", "blocks.{n}.attn1.to_out.0."),
    ("blocks.{n}.self_attn.norm_", "blocks.{n}.attn1.norm_"),
    ("blocks.{n}.cross_attn.q.", "blocks.{n}.attn2.to_q."),
    ("blocks.{n}.cross_attn.k.", "blocks.{n}.attn2.to_k."),
    ("blocks.{n}.cross_attn.v.", "blocks.{n}.attn2.to_v."),
    ("blocks.{n}.cross_attn.o.", "blocks.{n}.attn2.to_out.0."),
    ("blocks.{n}.cross_attn.k_img.", "blocks.{n}.attn2.add_k_proj."),
    ("blocks.{n}.cross_attn.v_img.", "blocks.{n}.attn2.add_v_proj."),
    ("blocks.{n}.cross_attn.norm_k_img.", "blocks.{n}.attn2.norm_added_k."),
    ("blocks.{n}.cross_attn.norm_", "blocks.{n}.attn2.norm_"),
    ("blocks.{n}.norm3.", "blocks.{n}.norm2."),
    ("blocks.{n}.ffn.0.", "blocks.{n}.ffn.net.0.proj."),
    ("blocks.{n}.ffn.2.", "blocks.{n}.ffn.net.2."),
    ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
)

_VAE_LAYERS: Pairs = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
    ("norm.", "norm."),
    ("to_qkv.", "to_qkv."),
    ("proj.", "proj."),
    ("resample.1.", "resample.1."),
    ("time_conv.", "time_conv."),
)
_VAE_PLACES: Pairs = (
    *((f"{side}.middle.{i}.", f"{side}.mid_block.{theirs}.")
      for side in ("encoder", "decoder")
      for i, theirs in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1"))),
    ("encoder.downsamples.{n}.", "encoder.down_blocks.{n}."),
    *((f"decoder.upsamples.{i}.",
       f"decoder.up_blocks.{i // 4}." + (f"resnets.{i % 4}." if i % 4 < 3 else "upsamplers.0."))
      for i in range(15)),
)  # fmt: skip
DIFFUSERS_VAE: Pairs = (
    *((f"{side}.{ours}.", f"{side}.{theirs}.")
      for side in ("encoder", "decoder")
      for ours, theirs in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))),
    *((place + layer, their_place + their_layer)
      for place, their_place in _VAE_PLACES
      for layer, their_layer in _VAE_LAYERS),
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
)  # fmt: skip

# (transformers' names, which ComfyUI shares, and Wan's own)
WAN_TEXT_ENCODER: Pairs = (
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."),
    ("encoder.block.{n}.layer.0.layer_norm.", "blocks.{n}.norm1."),
    ("encoder.block.{n}.layer.1.layer_norm.", "blocks.{n}.norm2."),
    ("encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.", "blocks.{n}.pos_embedding.embedding."),
    ("encoder.block.{n}.layer.0.SelfAttention.", "blocks.{n}.attn."),
    ("encoder.block.{n}.layer.1.DenseReluDense.wi_0.", "blocks.{n}.ffn.gate.0."),
    ("encoder.block.{n}.layer.1.DenseReluDense.wi_1.", "blocks.{n}.ffn.fc1."),
    ("encoder.block.{n}.layer.1.DenseReluDense.wo.", "blocks.{n}.ffn.fc2."),
)

# (transformers' names, and Wan's own of the CLIP tower; to_qkv is split besides)
WAN_IMAGE_ENCODER: Pairs = (
    ("vision_model.embeddings.patch_embedding.", "visual.patch_embedding."),
    ("vision_model.pre_layrnorm.", "visual.pre_norm."),
    ("vision_model.post_layernorm.", "visual.post_norm."),
    ("vision_model.encoder.layers.{n}.layer_norm1.", "visual.transformer.{n}.norm1."),
    ("vision_model.encoder.layers.{n}.layer_norm2.", "visual.transformer.{n}.norm2."),
    ("vision_model.encoder.layers.{n}.self_attn.out_proj.", "visual.transformer.{n}.attn.proj."),
    ("vision_model.encoder.layers.{n}.mlp.fc1.", "visual.transformer.{n}.mlp.0."),
    ("vision_model.encoder.layers.{n}.mlp.fc2.", "visual.transformer.{n}.mlp.2."),
)


def _rules(pairs: Pairs) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for source, target in pairs:
        pattern = re.escape(source).replace(r"\{n\}", r"(\d+)")
        rules.append((re.compile("^" + pattern), target.replace("{n}", r"\1")))
    return rules


def rename(state: Mapping[str, object], pairs: Pairs, to_theirs: bool = False) -> State:
    """Rename every key by the first pair that fits its beginning; keys that fit none are kept.

    Args:
        pairs: (ours, theirs).
        to_theirs: the direction; False reads their files.
    """
    rules = _rules(pairs if to_theirs else [(theirs, ours) for ours, theirs in pairs])
    renamed = {}
    for key, value in state.items():
        for pattern, target in rules:
            if pattern.match(key):
                key = pattern.sub(target, key, count=1)
                break
        renamed[key] = value
    return renamed  # type: ignore[return-value]
