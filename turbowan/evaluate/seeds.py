"""Which questions an evaluation asks unless told otherwise; without PyTorch, so that the command line can show it."""

SCENE_SEED = 24_680
# Training draws other streams: its numbers start at a configuration's seed x 1,000,003, from seeds below 900, and it
# draws pictures in batches of other sizes.
PICTURE_SEED = 900_000_000
