"""Conversion of checkpoints to and from other layouts, and uploads to the Hub."""
