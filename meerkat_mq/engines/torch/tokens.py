"""The tokenizer of a model: read in words, held against the embeddings, and what it adds to a text by itself."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import transformers

from meerkat_mq.core.foreign import is_plain_name, parse_json
from meerkat_mq.engines.torch.folder import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Json,
    in_words,
    key_of,
    place_in,
    read_json,
    walk,
)
from meerkat_mq.engines.torch.kinds import Bare, Kind
from meerkat_mq.engines.torch.tokenizer_trial import PROBES, TOKEN_KEYS, try_tokenizer
from meerkat_mq.errors import ModelError, UnsupportedModel, cut, printable, shown

_FEWEST = 8  # tokens: what a text that says anything needs
_TEXT = "The quick brown fox"
_RUST = re.compile(r"at line \d+ column \d+")
_SPECIAL_TOKENS = "special_tokens_map.json"
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_CORE_FILES = (TOKENIZER, "added_tokens.json", _SPECIAL_TOKENS, "vocab.json")
_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
_COUNTS = ("extra_ids", "offset")  # of tokens that a class adds by itself, one by one
_MOST_ADDED = 1000
_ENDLESS = ("CanineTokenizer", "CanineTokenizerFast")
_TYPES: dict[str, tuple[type, ...]] = {
    "tokenizer_class": (str,),
    "model_max_length": (int, float),
    "added_tokens_decoder": (dict,),
    "model_input_names": (list,),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token"), (str, dict)),
}
_OWN_FILES = "put this model's own tokenizer files into the folder"


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer.

    Attributes:
        tokenizer: of transformers; it pads on the right, with its end token where it has no pad token.
        start: the ids that it puts before every text, without immediate repetition: models never saw two.
        longest: input, in tokens: what tokenizer, configuration and position embeddings all hold.
        notes: what it adds to a text and a causal LM does not get; an encoder's own marks are right.
    """

    tokenizer: Any
    start: tuple[int, ...]
    longest: int
    notes: tuple[str, ...]


def read_tokens(folder: Path, bare: Bare) -> Tokens:
    """The tokenizer of a model, held against it.

    Raises:
        ModelError: its files are absent, damaged, or contradict each other or the model.
        UnsupportedModel: the model has no plain table of embeddings.
    """
    tokenizer = read_tokenizer(folder, bare.kind)
    _check_ids(tokenizer, bare.model, folder)
    before, after = _added_around(tokenizer, folder)
    start = tuple(token for token, _ in groupby(before))
    notes = []
    if bare.kind == "causal" and after:
        tokens = printable(cut(" ".join(tokenizer.convert_ids_to_tokens(list(after)))))
        notes.append(f"the tokenizer appends {tokens} to every text: it is dropped, for prompts go on")
    if bare.kind == "causal" and start != before:
        notes.append("the tokenizer starts a text twice: one start token is dropped")
    return Tokens(tokenizer, start, _longest(tokenizer, bare, folder), tuple(notes))


def read_tokenizer(folder: Path, kind: Kind = "causal") -> Any:
    """The tokenizer alone; it pads on the right. Raises as `read_tokens`."""
    table = _table(folder)
    if (folder / TOKENIZER).exists():
        try_tokenizer(folder / TOKENIZER)
    with in_words(partial(_place, folder, table), "the tokenizer cannot be loaded", _OWN_FILES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ids_of(tokenizer, PROBES)
    if kind == "encoder" and tokenizer.pad_token_id is None:
        raise ModelError(f"{folder / TOKENIZER_CONFIG}: pad_token", "is missing, and an encoder needs it", _OWN_FILES)
    if not isinstance(tokenizer.model_max_length, int | float) or not tokenizer.model_max_length >= _FEWEST:
        problem = f"{shown(tokenizer.model_max_length)} tokens hold no text"
        raise ModelError(f"{folder / TOKENIZER_CONFIG}: model_max_length", problem, "restore the model's own value")
    if next(iter(tokenizer.model_input_names), None) != "input_ids":
        problem = f"{shown(tokenizer.model_input_names)} does not begin with 'input_ids'"
        raise ModelError(f"{folder / TOKENIZER_CONFIG}: model_input_names", problem, "restore the model's own value")
    return tokenizer


def _table(folder: Path) -> Json:
    """What tokenizer_config.json holds, with types that transformers takes for granted."""
    file = folder / TOKENIZER_CONFIG
    table = read_json(file) if file.exists() else {}
    for key, kinds in _TYPES.items():
        value = table.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ModelError(f"{file}: {key}", f"{shown(value)} cannot be used", _OWN_FILES)
    for place, found in ((file, table), (folder / CONFIG, read_json(folder / CONFIG))):
        if found.get("tokenizer_class") in _ENDLESS:
            raise ModelError(f"{place}: tokenizer_class", "has a token for each character of Unicode", _OWN_FILES)
    for key in _COUNTS:
        if table.get(key, 0) not in range(_MOST_ADDED + 1):
            raise ModelError(f"{file}: {key}", f"{shown(table[key])} is no number from 0 to {_MOST_ADDED}", _OWN_FILES)
    _refuse_other_files(file, table)
    _refuse_strange_tokens(file, table)
    if (folder / _SPECIAL_TOKENS).exists() and _is_json(folder / _SPECIAL_TOKENS):  # else its loader says so
        _refuse_strange_tokens(folder / _SPECIAL_TOKENS, read_json(folder / _SPECIAL_TOKENS))
    return table


def _refuse_other_files(file: Path, table: Json) -> None:
    """What a tokenizer's class would open as its own files, wherever it lies; `init_inputs` are files by position.

    Older libraries left the paths of their own machine in two keys. Nobody opens those beside a tokenizer.json.
    """
    for key, value in table.items():
        names_one = key.endswith(("_file", "_spm")) and isinstance(value, str) and not is_plain_name(value, "")
        stale = key in ("tokenizer_file", "special_tokens_map_file") and file.with_name(TOKENIZER).exists()
        if (names_one and not stale) or (key == "init_inputs" and value):
            problem = f"names a file outside of the folder ({shown(value)})"
            raise ModelError(f"{file}: {cut(key)}", problem, "remove the key")


def _refuse_strange_tokens(file: Path, table: Json) -> None:
    """Of a token's keys that it does not know, the library says so on stdout, in the midst of what is read there.

    It takes a table for a token where that is marked as one by "__type"; where a list of tokens stands; and whatever
    special_tokens_map.json holds.
    """
    special = file.name == _SPECIAL_TOKENS
    for path, token in walk(table):
        if not path or not isinstance(token, dict):
            continue
        named = path[-1].endswith("_token") or (len(path) == 2 and path[0] in _TOKENS)
        marked = token.get("__type") == "AddedToken"
        if named or marked or (special and len(path) == 1 and path[0] not in _TOKENS[1:]):
            known = TOKEN_KEYS if special or path[0] == _TOKENS[0] else TOKEN_KEYS | {"__type"}
            if strange := token.keys() - known:
                raise ModelError(place_in(file, path), f"a token has no {shown(min(strange))}", "remove the key")


def _place(folder: Path, table: Json, said: str) -> str:
    """The file that a library's words are about, and the key in it where it is known."""
    core = folder / TOKENIZER
    if not core.exists() and not any((folder / name).exists() for name in _OTHER_TOKENIZERS):
        return str(folder)
    broken = next((file for name in _CORE_FILES if (file := folder / name).exists() and not _is_json(file)), None)
    if broken is not None:
        return str(broken)
    if core.exists() and _RUST.search(said):
        return str(core)
    key = key_of(said, table)
    return f"{folder / TOKENIZER_CONFIG}: {key}" if key else str(core if core.exists() else folder)


def _is_json(file: Path) -> bool:
    try:
        parse_json(file.read_bytes())
    except ValueError:
        return False
    return True


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids as the tokenizer itself gives them, with all that it adds."""
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]


def _check_ids(tokenizer: Any, model: Any, folder: Path) -> None:
    """Make sure that the model has an embedding for each token, special and added ones too: a text may name any."""
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if embeddings is None:
        problem = f"{type(model).__name__} has no plain table of embeddings"
        raise UnsupportedModel(f"{folder / CONFIG}: model_type", problem, "use another model")
    with in_words(str(folder), "the tokenizer's tokens cannot be listed", _OWN_FILES):
        table = {token: int(number) for token, number in tokenizer.get_vocab().items()}
        token = max(table, key=table.__getitem__, default="")
    if token and table[token] >= embeddings:
        problem = f"the tokenizer makes ids beyond the {embeddings} embeddings: {shown(token)} is {table[token]}"
        raise ModelError(str(folder), problem, f"{_OWN_FILES}, or save the model after resize_token_embeddings()")


def _added_around(tokenizer: Any, folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after any text, of which it makes the same tokens without them."""
    whole = ids_of(tokenizer, [_TEXT])[0]
    bare = list(tokenizer([_TEXT], add_special_tokens=False)["input_ids"][0])
    starts = range(len(whole) - len(bare) + 1)
    found = [start for start in starts if bare and whole[start : start + len(bare)] == bare]
    periods = [size for size in range(1, len(bare)) if bare[:size] * (len(bare) // size) == bare]
    twice = len(set(bare)) > 1 and periods  # a template can repeat the text where no special token is asked for, too
    if len(found) == 1 and not twice:
        return tuple(whole[: found[0]]), tuple(whole[found[0] + len(bare) :])
    said = "repeats" if found else "makes nothing, or other tokens than beside special ones, of"
    raise ModelError(str(folder), f"the tokenizer {said} {_TEXT!r}", _OWN_FILES)


def _longest(tokenizer: Any, bare: Bare, folder: Path) -> int:
    """The longest input. Position embeddings with a padding index start after it: RoBERTa's 514 hold 512 tokens."""
    text = bare.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 0  # XLNet says -1: any number
    limits = [tokenizer.model_max_length, positions if positions > 0 else math.inf]
    for name, module in bare.model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(module.num_embeddings - padding - 1)
    longest = int(min(*limits, 2**31))
    if longest < _FEWEST:
        raise ModelError(str(folder), f"its positions hold {longest} tokens", "restore the model's own config.json")
    return longest
