"""Training on examples folders of any size: order, reading, batches, the worker, its checkpoints."""
