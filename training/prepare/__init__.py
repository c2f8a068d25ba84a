"""Data preparation: raw files of any origin into the dataset folder of `cluster.dataset`."""
