"""Adapt a trained model: linear probes, learned prompts, heads, and recipes that continue training."""
