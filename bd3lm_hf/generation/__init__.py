"""Text from a model: prompts, samples, denoising traces."""
