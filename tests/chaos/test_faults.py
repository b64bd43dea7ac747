"""The registry: what plans can name is there, told apart, and written about."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from meerkat_mq.chaos import faults
from meerkat_mq.chaos.faults import FAULTS, Fault
from meerkat_mq.chaos.faults.fault import Place
from meerkat_mq.chaos.plan import shipped
from meerkat_mq.chaos.plan_file import FaultPlan, FederationPlan, PlanFile

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/faults.md").read_text(encoding="utf-8")


def kinds(of: Any) -> Iterator[type[Fault]]:
    for kind in of.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_every_fault_of_the_package_is_registered_under_its_own_name() -> None:
    for file in Path(faults.__file__).parent.glob("*.py"):
        import_module(f"{faults.__name__}.{file.stem}")
    here = {kind for kind in kinds(Fault) if kind.__module__.startswith(faults.__name__)}
    assert set(FAULTS.values()) == {kind for kind in here if not inspect.isabstract(kind)}
    for name, kind in FAULTS.items():
        assert re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower() == name


@pytest.mark.parametrize("name", FAULTS)
def test_a_registered_fault_can_be_planned(name: str) -> None:
    kind = FAULTS[name]
    assert kind.name == name
    assert kind.on in get_args(Place)
    kind()  # every parameter has a default
    assert not inspect.isabstract(kind)


@pytest.mark.parametrize("name", FAULTS)
def test_a_registered_fault_is_documented_with_its_parameters(name: str) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    for key in FAULTS[name].model_fields:
        shared = key in ("share", "way", "topic") and "share" in FAULTS[name].model_fields
        assert f"`{key}`" in (PAGE if shared else row), key


def test_plans_and_their_keys_are_documented() -> None:
    for name in shipped():
        assert f"| `{name}` |" in PAGE
    for prefix, section in (("", PlanFile), ("federation.", FederationPlan), ("", FaultPlan)):
        for key in section.model_fields.keys() - {"federation", "attach"}:
            assert f"| `{prefix}{key}` |" in PAGE, key


class Recorded:
    """A process that only notes what is done to it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def signal(self, number: Any) -> None:
        self.done.append(number.name)

    def __getattr__(self, name: str) -> Any:
        async def note() -> None:
            self.done.append(name)

        return note


@pytest.mark.parametrize(
    ("name", "injected", "healed"),
    [
        ("sigkill", ["kill"], ["start"]),
        ("sigstop", ["SIGSTOP"], ["SIGCONT"]),
        ("broker-stop", ["stop"], ["start"]),
        ("broker-kill", ["kill"], ["start"]),
    ],
)
async def test_a_fault_of_a_process_strikes_and_heals(name: str, injected: list[str], healed: list[str]) -> None:
    process: Any = Recorded()
    stage: Any = SimpleNamespace(broker=process, processes={"node-0": process})
    async with FAULTS[name]().strike(stage, "node-0", None):  # type: ignore[arg-type]
        assert process.done == injected
    assert process.done == injected + healed
