"""The start of the model process, before the libraries are loaded."""

from __future__ import annotations

import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from ctclip.errors import CtclipError
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.workers import end_with_parent
from ctclip.serve.settings import Settings


def main(pipe: Connection, settings: Settings, scratch: Path) -> None:
    """Load the model, report that to the service, and serve. If loading fails, send one line to the service.

    ``scratch``: a folder of the service for temporary files, so that they are deleted with the service's other files.
    """
    # End even in the middle of work: a killed service reads no answer.
    end_with_parent()
    # Ctrl-C reaches the whole process group; the service ends this process by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = str(scratch)
    # Imported late: these take seconds to import, and torch creates a temporary folder.
    from ctclip.inference.index import index_facts
    from ctclip.serve.worker import Worker

    try:
        if settings.index:
            index_facts(settings.index)
        worker = Worker(pipe, settings)
    except (CtclipError, PreprocessingError, OSError) as error:
        pipe.send({"request": 0, "failed": " ".join(str(error).split())})
        return
    worker.run()
