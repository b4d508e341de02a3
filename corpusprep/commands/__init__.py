"""What the commands beside `run` and `train` do."""
