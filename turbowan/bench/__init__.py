"""What `turbowan bench` runs: true sizes, random weights, one JSON line per case."""
