"""Heads turn encoded volumes into named scores, by prompts, a linear map, or a user-defined method. They are stored
with the model."""
