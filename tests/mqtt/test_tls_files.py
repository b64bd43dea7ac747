"""TLS files that the process may not read: in a container, keys are often another user's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from meerkat_mq.broker.certs import write_certificates
from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import ConfigError
from meerkat_mq.mqtt.tls import client_context

IN_THE_IMAGE = 10001


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Unlike pytest's own, one that every user may enter."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def locked(folder: Path, name: str) -> Iterator[int]:
    """Nobody but the owner may read a file, and we are not the owner; gives who we are."""
    owner = os.geteuid()
    (folder / name).chmod(0o600 if owner == 0 else 0o000)
    try:
        if owner == 0:
            os.seteuid(IN_THE_IMAGE)
        yield os.geteuid()
    finally:
        os.seteuid(owner)


@pytest.mark.parametrize(("name", "key"), [("key.pem", "cert_file"), ("ca.pem", "ca_file")])
def test_a_file_of_another_user_is_named_with_who_should_read_it(open_folder: Path, name: str, key: str) -> None:
    *_, made = write_certificates(open_folder, nodes=["a"])
    files = {"ca_file": "ca.pem", "cert_file": "cert.pem", "key_file": "key.pem"}
    broker = BrokerConfig(url="mqtts://h", **{key: made.folder / file for key, file in files.items()})  # type: ignore[arg-type]
    client_context(broker)
    words = rf"^broker\.{key}: .*{name}: Permission denied; make it readable to the user "
    with locked(made.folder, name) as user, pytest.raises(ConfigError, match=f"{words}{user}$"):
        client_context(broker)
