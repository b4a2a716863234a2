"""A service that finds abnormalities in scans, over HTTP and on a page."""
