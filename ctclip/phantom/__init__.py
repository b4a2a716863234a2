"""A generator of chest-CT phantoms with reports, for use where real scans cannot be shared."""
