"""Heads turn encoded volumes into named scores: prompts, a linear map, or a head of the user's own. They are kept
with the model."""
