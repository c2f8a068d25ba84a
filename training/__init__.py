"""Training: data preparation, batch streams, models, trainer, publishing, the online trainer, evaluation."""
