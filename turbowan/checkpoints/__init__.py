"""Every checkpoint people have, to one set of modules and back."""

from .load import load_image_encoder, load_text_encoder, load_transformer, load_vae

__all__ = ["load_image_encoder", "load_text_encoder", "load_transformer", "load_vae"]
