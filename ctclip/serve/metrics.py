"""What a service counts, for Prometheus. No label holds anything of a scan."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("ctclip_requests_total", "Requests answered.", ["route", "status"])
SCANS = Counter("ctclip_scans_total", "Scans worked on, by how they ended.", ["outcome"])
SECONDS = Histogram("ctclip_scan_seconds", "From the end of the upload to the scores.", buckets=(0.5, 1, 2, 5, 10, 30, 60, 300))  # fmt: skip
BUSY = Gauge("ctclip_scans_waiting", "Scans that wait or are worked on.")
RESTARTS = Counter("ctclip_worker_restarts_total", "How often the model's process has died and was started again.")
