"""Measuring whole generation on one GPU, beside transformers and beside what the memory allows."""
