"""Likelihood, generative quality and the lm-evaluation-harness."""
