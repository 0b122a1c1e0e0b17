"""What optimises: arguments, trainer, callbacks and the training script."""
