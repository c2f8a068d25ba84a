"""Ids and content become vectors: vocabularies, batches, sharded tables, encoders, deltas."""
