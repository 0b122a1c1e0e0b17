"""What travels to the Hub: flat files that import torch and transformers only."""
