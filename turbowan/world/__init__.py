"""The procedural world the embedded model is trained on: scenes, captions, and the image analysis that judges them."""
