"""Audits of data and models: duplicates, geometry of embeddings, concepts, mismatched pairs of volume and report."""
