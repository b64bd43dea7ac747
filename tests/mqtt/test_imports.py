"""Only `mqtt/` and `broker/` know an MQTT library, and in `mqtt/` only one module."""

import ast
from pathlib import Path

import meerkat_mq

PACKAGE = Path(meerkat_mq.__file__).parent
LIBRARIES = {"aiomqtt", "paho", "amqtt", "asyncio_mqtt", "gmqtt"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_mqtt_libraries_stay_behind_the_session() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if imported(path) & LIBRARIES}
    assert users == {"mqtt/connection.py", "broker/fallback.py"}
