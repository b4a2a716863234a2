"""Explain where a model sees a finding: maps in the space of the scan, regions of these maps, and images of their
peaks."""
