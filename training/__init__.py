"""Training: arguments, trainer, callbacks and the training script."""
