"""How far a scan is from those a model was trained on."""
