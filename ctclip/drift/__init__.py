"""Detect scans that are far from a model's training scans."""
