"""A key of `[rounds]` is declared once (config/rounds.py), and all who must know it do: nothing else names it."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from meerkat_mq.config import FIXED, RoundRules, RoundsConfig, RunSpec, ServerConfig
from meerkat_mq.errors import ConfigError, RunMismatch
from meerkat_mq.ledger.run import Run, check_same, settings_of
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire import frames
from meerkat_mq.wire.descriptor import RunDescriptor, decode_control

NODES = 6
ON_THE_WIRE = {"count": "rounds"}  # the one key that has another name there


def prepared(folder: Path, begun: RunDescriptor | None = None, **rounds: Any) -> Run:
    table = {"federation": "f", "state_dir": folder, "engine": "toy", "rounds": {"min_nodes": NODES, **rounds}}
    return prepare_run(ServerConfig.model_validate(table), begun)


def another(key: str) -> Any:
    """A value that is not the default, and that goes with the other keys' defaults."""
    field = RoundsConfig.model_fields[key]
    match NODES if key == "min_nodes" else field.default:
        case None:
            return 1
        case bool(default):
            return not default
        case int(default):
            return default + 1
        case float(default):
            return default / 2
        case default:
            return next(value for value in get_args(field.annotation) if value != default)


def is_fixed(key: str) -> bool:
    return key in RunSpec.model_fields or FIXED in RoundRules.model_fields[key].metadata


@pytest.mark.parametrize("key", RoundsConfig.model_fields)
def test_a_key_reaches_all_who_must_know_it(key: str, tmp_path: Path) -> None:
    value, mode = another(key), dict[str, Any]()
    try:
        prepared(tmp_path, **{key: value})
    except ValueError:  # it is for buffered runs
        mode = {"mode": "buffered"}
    begun = prepared(tmp_path, **mode)
    again = prepared(tmp_path, begun.descriptor, **mode, **{key: value})

    assert getattr(begun.settings, key) != value
    assert getattr(again.settings, key) == value
    wire = json.loads(again.descriptor.encode())
    assert wire.get(ON_THE_WIRE.get(key, key)) == (value if key in RunSpec.model_fields else None)
    kept = json.loads(json.dumps(again.rules))
    assert kept["rounds"][key] == value
    read = decode_control(again.descriptor.encode(), RunDescriptor)
    assert settings_of(read, kept, measured=again.settings.measured) == again.settings.model_copy(
        update={"frame_bytes": frames.MAX_FRAME_BYTES}
    )

    if not is_fixed(key):
        check_same(again, begun.descriptor, begun.rules, "ledger.sqlite")
        return
    besides = "max_staleness" if key == "mode" else key  # it goes with the mode
    with pytest.raises(RunMismatch, match=rf"^ledger\.sqlite: rounds\.({key}|{besides}): the run was begun with"):
        check_same(again, begun.descriptor, begun.rules, "ledger.sqlite")


@pytest.mark.parametrize("section", [RunSpec, RoundRules])
def test_every_key_has_a_sentence(section: type[RunSpec]) -> None:
    page = (Path(__file__).parents[1] / "docs/configuration.md").read_text(encoding="utf-8")
    for key in section.__annotations__:
        assert re.search(rf"^\| `rounds\.{key}` \|.*\| [^|]{{10,}} \|$", page, re.MULTILINE), key


def test_what_toml_takes_fits_a_frame(tmp_path: Path) -> None:
    bounds = {"local_steps": frames.MAX_STEPS, "perturbations": frames.MAX_STEPS, "max_staleness": frames.MAX_STALENESS}
    for key, most in (bounds | {"directions": frames.MAX_LANES}).items():
        RoundsConfig.model_validate({"mode": "buffered", key: most})
        with pytest.raises(ValueError, match=key):
            RoundsConfig.model_validate({"mode": "buffered", key: most + 1})
    with pytest.raises(ConfigError, match="local_steps × perturbations"):
        prepared(tmp_path, local_steps=frames.MAX_STEPS, perturbations=2)
