"""The networks: transformer, VAE, text encoder, image encoder. No file access here."""
