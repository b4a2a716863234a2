"""Drafts of reports: written by one of three methods, and each sentence compared with the detector.

A writer (``writers.py``) writes the sections from an encoded volume. ``draft.py`` reads what each sentence claims, and adds
the detector's probability of the claim and its place. ``store.py`` drafts the volumes of a store, for `ctclip evaluate
--reports`.
"""
