"""Adapting a model with labels: linear probes, learned prompts, and recipes that continue its training."""
