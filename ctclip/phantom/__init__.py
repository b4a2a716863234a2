"""A generator of chest-CT phantoms with reports, for everyone who cannot share real ones."""
