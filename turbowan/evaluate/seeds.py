"""Which questions an evaluation asks unless told otherwise; without PyTorch, so that the command line can show it."""

SCENE_SEED = 24_680
# Training draws scenes and cameras from a stream before its pictures: even from the same number it gets other ones.
PICTURE_SEED = 900_000_000
