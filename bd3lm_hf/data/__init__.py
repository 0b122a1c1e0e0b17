"""Datasets and corpora: read, split, packed and streamed."""
