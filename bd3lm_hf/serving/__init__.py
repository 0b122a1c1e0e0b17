"""`bd3lm serve`: transformers' OpenAI-compatible server, with requests batched block by block."""
