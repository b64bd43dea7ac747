"""No model folder can run code: it is refused before transformers sees it, also on a terminal that answers yes."""

import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from meerkat_mq.engines.torch import folder as folder_module
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.errors import ModelError, UnsupportedModel
from tests.engines import tiny

ROOT = Path(__file__).parents[2]
MODULE = 'open({marker!r}, "w").close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n'
COMMANDS = """
import sys
from meerkat_mq.cli import main
from meerkat_mq.errors import ModelError
from meerkat_mq.engines.torch.load import load_model

for arguments in {commands!r}:
    sys.argv = ["meerkat", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code)
for folder in {folders!r}:
    try:
        load_model(folder)  # as a node does
    except ModelError as error:
        print("ended with", error.exit_code)
"""


def in_config(folder: Path) -> None:
    tiny.change(
        folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    )


def in_config_of_a_known_type(folder: Path) -> None:
    tiny.change(folder / "config.json", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})


def in_tokenizer(folder: Path) -> None:
    tiny.change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "mine.T"]})


def in_tokenizer_as_a_list(folder: Path) -> None:
    tiny.change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map=["mine.T", "mine.T"])


def deep_inside(folder: Path) -> None:
    tiny.change(folder / "config.json", text_config={"inner": [{"auto_map": {"AutoModel": "mine.M"}}]})


def of_another_place(folder: Path) -> None:
    tiny.change(folder / "config.json", auto_map={"AutoConfig": "somebody/else--mine.C"})


PLANTS = [in_config, in_config_of_a_known_type, in_tokenizer, in_tokenizer_as_a_list, deep_inside, of_another_place]


@pytest.fixture
def planted(folders: dict[str, Path], tmp_path: Path) -> Callable[[Callable[[Path], None]], Path]:
    """A copy of a tiny model whose code would leave a marker behind."""

    def plant(how: Callable[[Path], None]) -> Path:
        folder = Path(shutil.copytree(folders["llama"], tmp_path / how.__name__))
        (folder / "mine.py").write_text(MODULE.format(marker=str(tmp_path / "ran")))
        how(folder)
        return folder

    return plant


@pytest.mark.parametrize("how", PLANTS)
def test_code_is_refused_before_transformers_sees_it(
    planted: Callable[..., Path], tmp_path: Path, how: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted(how)
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.delattr(transformers, name, raising=True)
    for look in (load_model, find_folder):
        with pytest.raises(ModelError, match=r"config\.json: .*auto_map: names code .*never runs code from a model"):
            look(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_another_place_are_refused(planted: Callable[..., Path], key: str) -> None:
    folder = planted(lambda folder: tiny.change(folder / "config.json", **{key: "somebody/kernel"}))
    with pytest.raises(ModelError, match=f"{key}: names code of another place"):
        load_model(folder)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"": "somebody/kernel"}, r"attn_implementation\.: "),
        ({"text_config": "somebody/kernel"}, r"attn_implementation\.text_config: "),
        (["somebody/kernel"], r"attn_implementation\.0: "),
        ("flash_attention_2", "attn_implementation: "),
        ("paged|flash_attention_3", "attn_implementation: "),
    ],
)
def test_kernels_named_by_part_or_by_their_short_name(planted: Callable[..., Path], value: object, place: str) -> None:
    """transformers fetches flash kernels, where they are not installed, from the hub."""
    folder = planted(lambda folder: tiny.change(folder / "config.json", attn_implementation=value))
    with pytest.raises(ModelError, match=f"{place}names code of another place .*; remove the key"):
        find_folder(folder)


@pytest.mark.parametrize("value", ["flex_attention", "deepgemm", "sonicmoe", {"text_config": "flex_attention"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_code_that_is_compiled_or_fetched_when_it_runs(planted: Callable[..., Path], key: str, value: object) -> None:
    folder = planted(lambda folder: tiny.change(folder / "config.json", **{key: value}))
    with pytest.raises(ModelError, match=rf"config\.json: {key}.*: names code of another place or code to compile"):
        find_folder(folder)


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_attention_of_the_library_itself(planted: Callable[..., Path], value: str | None) -> None:
    keys = {"attn_implementation": value, "cache_implementation": "hybrid"}
    assert load_model(planted(lambda folder: tiny.change(folder / "config.json", **keys))).kind == "causal"


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("family", ["rwkv", "yoso", "mra"])
def test_families_that_look_for_a_compiler(planted: Callable[..., Path], family: str, inner: bool) -> None:
    keys = {"text_config": {"model_type": family}} if inner else {"model_type": family}
    folder = planted(lambda folder: tiny.change(folder / "config.json", **keys))
    with pytest.raises(UnsupportedModel, match=rf"model_type: for '{family}' transformers looks for a compiler"):
        find_folder(folder)


def test_all_families_that_look_for_a_compiler_are_known() -> None:
    """Of the installed transformers; models that it only can build by being told to, such as by quantisation, aside."""
    asks = re.compile(r"\b(is_ninja_available|load_inline|cpp_extension|subprocess|load_cuda_kernels)\b")
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    assert {file.parent.name for file in files if asks.search(file.read_text())} <= folder_module._COMPILED


@pytest.mark.timeout(240)
def test_a_terminal_that_answers_yes(planted: Callable[..., Path], tmp_path: Path) -> None:
    folders = [str(planted(how)) for how in (in_config, in_tokenizer)]
    (tmp_path / "t.txt").write_text("\n\n".join(f"a text of some words, number {number}" for number in range(20)))
    text = ("--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "m.mkm"))
    masks = [["mask", "--model", folder, *text] for folder in folders]
    commands = masks + [["doctor", "--model", folder] for folder in folders]
    done, said = on_a_terminal(COMMANDS.format(commands=commands, folders=folders))
    assert done == 0, said
    assert said.count("ended with 4") == len(commands) + len(folders), said
    assert said.count("auto_map: names code") >= len(commands), said
    assert "[y/N]" not in said
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in said


def on_a_terminal(script: str) -> tuple[int, str]:
    """Run it on a pseudo-terminal whose user always says yes."""
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 64)
    process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(200)
    reader.join(20)
    os.close(ours)
    return code, b"".join(parts).decode(errors="replace")
