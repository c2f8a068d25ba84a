"""The two-stage model: history encoder, towers, ranker, and the form of it that serves."""
