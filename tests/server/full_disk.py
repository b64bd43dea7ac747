"""`python -m tests.server.full_disk`: a server whose files may have MEERKAT_DISK bytes, as on a disk that fills up."""

import os
import resource

import typer

from meerkat_mq.server.__main__ import command

if __name__ == "__main__":
    size = int(os.environ["MEERKAT_DISK"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    typer.run(command)
