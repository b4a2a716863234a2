"""Volume files, one module per format, each with ``read(path, source, ...) -> Volume``. Files are not trusted.

Headers are parsed here, within bounds, before anything is allocated; ``source`` is what messages call the file. Geometry
is returned as the header states it: ``geometry_check`` decides whether it can be trusted.
"""
