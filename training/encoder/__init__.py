"""Fine-tuning of the text encoder on what users did: `recloop finetune`."""
