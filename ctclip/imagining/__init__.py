"""Generate synthetic volumes from texts, to show what a model associates with words.

``dream.py`` optimises a volume until its embedding matches the text. ``synthetic.py`` writes such volumes, marked as
synthetic in their name, their header and on their page. ``imagine.py`` does both for many texts.
"""
