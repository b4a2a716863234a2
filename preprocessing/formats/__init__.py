"""Volume files, one module per format, each with ``read(path, source, ...) -> Volume``. Files are not trusted.

Headers are parsed here, within bounds, before memory is allocated; ``source`` is the name of the file in messages.
Geometry is returned as stated in the header: ``geometry_check`` decides whether it can be trusted.
"""
