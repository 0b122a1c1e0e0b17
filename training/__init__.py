"""Train models: arguments, trainer, callbacks and the training script."""
