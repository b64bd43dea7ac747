"""paho does not promise the private attributes that `mqtt/connection.py` uses: they are looked at here."""

import ast
import inspect
import tomllib
from pathlib import Path

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from meerkat_mq.mqtt import connection


def test_what_is_used_is_there() -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(connection)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("client", "self._client")
    }
    assert {name for name in used if name.startswith("_")} == {"_sock_close"}
    client = Client(CallbackAPIVersion.VERSION2)
    assert [name for name in sorted(used) if not hasattr(client, name)] == []


def test_only_minor_versions_are_allowed_that_were_tried() -> None:
    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    needs = {text.partition(">")[0]: text for text in table["project"]["dependencies"]}
    assert needs["paho-mqtt"] == "paho-mqtt>=2.1,<2.3"
    assert "aiomqtt" not in needs
