"""The documentation says what the code does: keys and defaults, links, commands and options, exit codes."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from meerkat_mq import errors
from meerkat_mq.cli import command_line
from meerkat_mq.config import NodeConfig, ServerConfig, check_config
from meerkat_mq.observe.signals import IN_ORDER_S
from meerkat_mq.observe.start import SIGNALLED, WORDS
from meerkat_mq.tasks.load import load_task

ROOT = Path(__file__).parents[1]
NOT_OURS = ("runs", "build", "dist")
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not page.relative_to(ROOT).parts[0].startswith((".", *NOT_OURS)) and "node_modules" not in page.parts
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
COMMANDS: dict[str, Any] = vars(typer.main.get_command(command_line()))["commands"]


def test_there_are_pages() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "docs/configuration.md", "docs/tasks.md", "docs/errors.md", "nodes/README.md"} <= names


# --- keys ---


def keys_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        inner = next((arg for arg in (field.annotation, *get_args(field.annotation)) if is_section(arg)), None)
        if inner is None:
            yield prefix + name, field
        else:
            yield from keys_of(inner, f"{prefix}{name}.")


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def documented(section: str) -> dict[str, str]:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", part, re.MULTILINE))


@pytest.mark.parametrize(("section", "kind"), [("federation.toml", ServerConfig), ("node.toml", NodeConfig)])
def test_every_key_is_documented_with_its_default(section: str, kind: type[BaseModel]) -> None:
    table = documented(section) | documented("broker")
    keys = dict(keys_of(kind))
    assert table.keys() == keys.keys()
    for key, field in keys.items():
        if field.is_required() or field.default is None:
            assert table[key] == ("required" if field.is_required() else "none"), key
        else:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert tomllib.loads(f"x = {table[key].strip('`')}")["x"] == default, key


@each_page
def test_toml_examples_are_valid(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        table = tomllib.loads(block)
        if "template" in table:
            (tmp_path / "task.toml").write_text(block, encoding="utf-8")
            load_task(tmp_path / "task.toml")
        elif "federation" in table:
            check_config(table, NodeConfig if "id" in table else ServerConfig, where=page.name)


# --- lines ---


@each_page
def test_lines_are_short(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= (240 if line.startswith("|") else 120), f"line {number}: {line}"


# --- links ---


def links(text: str) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ {4}.*$|`[^`\n]*`", "", prose, flags=re.MULTILINE)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_resolve(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


# --- commands ---


def code(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(
        [*re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE), *blocks, *re.findall(r"`([^`\n]+)`", text)]
    )


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    for name, rest in re.findall(r"^(?:\S*/)?meerkat ([a-z]+)\b([^\n|;&]*)", code(page), re.MULTILINE):
        assert name in COMMANDS, f"meerkat {name}"
        known = {opt for param in COMMANDS[name].params for opt in (*param.opts, *param.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= known, f"meerkat {name}{rest}"


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", code(page))) <= targets


@each_page
def test_modules_and_scripts_exist(page: Path) -> None:
    for module in re.findall(r"python3? -m ((?:meerkat_mq|protocol)[\w.]*)", code(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for script in re.findall(r"\bpython3? ((?:benchmarks|scripts)/[\w/.]+)", code(page)):
        assert (ROOT / script).is_file(), script


def test_demo_options_in_make_args_exist() -> None:
    known = {opt for param in COMMANDS["demo"].params for opt in param.opts}
    used = [args for page in PAGES for args in re.findall(r"make demo ARGS='([^']*)'", code(page))]
    assert used
    assert {opt for args in used for opt in re.findall(r"--[a-z-]+", args)} <= known


def test_a_folder_of_certificates_can_be_copied_again() -> None:
    """`cp -r a b` makes b/a where b is there, and the service goes on with the old certificate."""
    copied = [source for page in PAGES for source in re.findall(r"\bcp -r (pki/\S+)", code(page))]
    assert copied
    assert [source for source in copied if not source.endswith("/.")] == []


def test_the_threat_model_names_tests_that_exist() -> None:
    """A name without a folder is in the folder of the name before it."""
    rows = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8").splitlines()
    for names in (re.findall(r"`([\w/]+\.py)`", row) for row in rows):
        folder = Path()
        for name in map(Path, names):
            folder = name.parent if name.parent.name else folder
            assert (ROOT / folder / name.name).is_file(), name


# --- exit codes ---


def exit_codes(kind: type[errors.MeerkatError]) -> set[int]:
    return {kind.exit_code}.union(*(exit_codes(inner) for inner in kind.__subclasses__()))


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert codes == exit_codes(errors.MeerkatError) | {0}


# --- what ends a service ---


def below(kind: type[errors.MeerkatError]) -> Iterator[type[errors.MeerkatError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from below(inner)


def test_the_fate_of_every_error_is_documented() -> None:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", text, re.MULTILINE))
    for kind in below(errors.MeerkatError):
        listed = next(parent.__name__ for parent in kind.__mro__ if parent.__name__ in table)
        assert table[listed] == kind.fate, kind.__name__
    assert table.keys() <= {kind.__name__ for kind in below(errors.MeerkatError)}


def final_codes() -> set[int]:
    """The exit codes that only an error that a person must mend can cause."""
    by_code: dict[int, set[errors.Fate]] = {}
    for kind in below(errors.MeerkatError):
        by_code.setdefault(kind.exit_code, set()).add(kind.fate)
    return {code for code, fates in by_code.items() if fates == {errors.Fate.FINAL}} - {errors.MeerkatError.exit_code}


def unit_of(name: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "nodes" / name).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", ["meerkat-node.service", "meerkat-server.service"])
def test_no_exit_code_that_may_come_of_a_fault_that_passes_forbids_a_restart(name: str) -> None:
    unit = unit_of(name)
    forbidden = {int(code) for code in unit["RestartPreventExitStatus"].split()}
    assert forbidden == final_codes() == {2, 3, 4}
    assert (unit["Restart"], unit["StartLimitIntervalSec"]) == ("on-failure", "0")
    assert int(unit["RestartSec"]) >= 30  # what fails again and again does so at a slow pace
    assert int(unit["TimeoutStopSec"]) > IN_ORDER_S
    assert unit["SuccessExitStatus"].split() == [str(SIGNALLED + number) for number in sorted(WORDS)]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", ["meerkat-node.service", "meerkat-server.service"])
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    text = (ROOT / "nodes" / name).read_text(encoding="utf-8").replace("/opt/meerkat/bin/meerkat", sys.executable)
    (tmp_path / name).write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if name in line] == []
