"""The mark of a server in its folder."""

import subprocess
import sys
from pathlib import Path

from meerkat_mq.server.mark import marked

HOLD = (
    "import sys, pathlib; from meerkat_mq.server.mark import marked\nwith marked(pathlib.Path(sys.argv[1])) as alone:\n"
)
HOLD += "    print(alone, flush=True); sys.stdin.read()"


def test_each_process_sees_the_others_and_a_killed_one_is_none(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    first, alone = start()
    assert alone == "True"
    with marked(tmp_path) as too:
        assert not too
        first.communicate()
        second, alone = start()
        assert alone == "False"
    second.kill()
    second.communicate()
    with marked(tmp_path) as alone_again:
        assert alone_again


def test_where_no_mark_can_be_left_nothing_is_held_against_it(tmp_path: Path) -> None:
    with marked(tmp_path / "no-such-folder") as alone:
        assert alone
