"""A web server on loopback, in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from typing import TypeVar

Web = TypeVar("Web", bound=HTTPServer)


@contextmanager
def serving(server: Web) -> Iterator[Web]:
    """Let a server answer within the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
