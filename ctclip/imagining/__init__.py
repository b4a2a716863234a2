"""From texts to volumes: volumes that nobody was scanned for, to see what a model takes words to mean.

``dream.py`` optimises a volume until the model reads the text in it. ``synthetic.py`` writes such volumes, marked as
synthetic in their name, their header and on their page. ``imagine.py`` does both for many texts.
"""
