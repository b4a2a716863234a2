"""From what an encoder sees to named scores: prompts, a linear map, or a head of the user's own. Kept with the model."""
