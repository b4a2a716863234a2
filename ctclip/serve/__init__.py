"""A service: scans in, findings out, over HTTP and on a page."""
