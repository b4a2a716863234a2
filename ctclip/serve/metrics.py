"""Metrics for Prometheus. No label contains information about a scan."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("ctclip_requests_total", "Requests answered.", ["route", "status"])
SCANS = Counter("ctclip_scans_total", "Scans by outcome.", ["outcome"])
SECONDS = Histogram("ctclip_scan_seconds", "Time from the end of the upload to the scores.", buckets=(0.5, 1, 2, 5, 10, 30, 60, 300))  # fmt: skip
BUSY = Gauge("ctclip_scans_waiting", "Scans waiting or in progress.")
RESTARTS = Counter("ctclip_worker_restarts_total", "Number of times that the model's process was restarted.")
