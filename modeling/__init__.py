"""The code that travels to the Hub: flat files that import torch and transformers only."""

# First: importing transformers registers the model types, which imports the files of this folder.
import transformers  # noqa: F401
