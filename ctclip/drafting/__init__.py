"""Draft reports with one of three methods, and compare each sentence with the detector.

A writer (``writers.py``) writes the sections from an encoded volume. ``draft.py`` reads what each sentence claims, and adds
the detector's probability of the claim and its place. ``store.py`` drafts the volumes of a store, for `ctclip evaluate
--reports`.
"""
