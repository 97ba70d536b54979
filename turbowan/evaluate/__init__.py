"""How good a model is: reconstructions, prompts shown right, error tables, sheets of frames to look at."""
