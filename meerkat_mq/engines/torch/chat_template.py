"""A chat template is rendered in a process of its own: it is a program, and from anybody.

Its sandbox keeps it from files and from Python's own objects, not from loops in loops, macros that call themselves
twice, or texts of any length. So this process has bounds of time and memory, and what it says is bounded, too.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from meerkat_mq.errors import reason

_SECONDS: Final = 10  # of processor time, beside those of the import
_MEMORY: Final = 512 << 20  # bytes, likewise
_MOST: Final = 1 << 20  # characters of a chat; a bundle takes 65,536
_REFUSED: Final = 4

Chat = Mapping[str, Any]  # messages, and other arguments of transformers' `render_jinja_template`


def render(tokenizer: Any, chats: Sequence[Chat]) -> list[str]:
    """What the template of a tokenizer of transformers makes of chats.

    Raises:
        ValueError: it cannot be used, or not within these bounds.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    given = {"template": tokenizer.get_chat_template(), "chats": [{**special, **chat} for chat in chats]}
    found, problem = _rendered(json.dumps(given))
    if problem:
        raise ValueError(problem)
    return list(found)


@lru_cache(maxsize=64)
def _rendered(given: str) -> tuple[tuple[str, ...], str]:
    """The chats; or what is wrong."""
    try:
        done = subprocess.run(  # noqa: S603 - this very file
            [sys.executable, "-P", "-m", __name__, str(_SECONDS), str(_MEMORY)],
            input=given.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # what this process finds
            check=False,
        )
    except OSError as error:
        return (), f"no process can be started for it: {reason(error)}"
    if done.returncode == _REFUSED:
        return (), done.stdout.decode(errors="replace")
    if done.returncode > 0:
        return (), "transformers does not render it in a process of its own"
    if done.returncode < 0:
        return (), f"it takes more than {_SECONDS} s or {_MEMORY >> 20} MiB, or ends the process that renders it"
    return tuple(json.loads(done.stdout)), ""


def _bound(seconds: int, memory: int) -> None:
    """No more than so much time and memory from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds += int(used.ru_utime + used.ru_stime) + 1
    with contextlib.suppress(ValueError, OSError):  # a tighter limit is there already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        memory += pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _main(seconds: int, memory: int) -> int:
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415 - here alone

    given = json.load(sys.stdin)
    _bound(seconds, memory)
    try:
        texts = []
        for chat in given["chats"]:
            conversations, template = [chat.pop("messages")], given["template"]
            ((text,), _) = render_jinja_template(conversations=conversations, chat_template=template, **chat)
            if len(text) > _MOST:
                raise ValueError(f"it says {len(text):,} characters, more than {_MOST:,}")
            texts.append(text)
        said = json.dumps(texts)
    except Exception as error:
        sys.stdout.buffer.write(reason(error).encode(errors="replace"))
        return _REFUSED
    sys.stdout.write(said)
    return 0


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), int(sys.argv[2])))
