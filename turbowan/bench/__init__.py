"""What `turbowan bench` runs: true sizes, random weights, one record per case."""
