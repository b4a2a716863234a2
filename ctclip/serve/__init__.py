"""A service that detects findings in scans, over HTTP and on a web page."""
