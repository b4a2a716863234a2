"""A model of one's own from a few labels: linear probes, learned prompts, and recipes that continue its training."""
