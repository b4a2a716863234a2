"""Volume files of strangers, one module a format, each with ``read(path, source, ...) -> Volume``.

Headers are parsed here, within bounds, before anything is allocated; ``source`` is what messages call the file. Geometry
is returned as the header states it: ``geometry_check`` decides whether it can be trusted.
"""
