"""What `ctclip audit` and its kin find of what was planted."""
