"""A process that looks at damaged model folders, and reports on each: memory, processor time and files are watched.

    echo KIND START STOP | python -m tests.fuzz.look_at_models ROOT

Each line of stdin is an order. Writes a JSON line before and after each mutant to stdout, and {} after each order. What
a library prints, warns of or panics with is a fault, and so are files that were changed or opened elsewhere,
connections and processes. It ends by a signal where a mutant takes the process down, or more than a limit.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "0"  # a model folder must not lead to the hub, whatever the surroundings say

import torch

from meerkat_mq.engines.torch import chat_template, tokenizer_trial
from meerkat_mq.engines.torch.export import export_model
from meerkat_mq.engines.torch.inspect import Finding, inspect_model
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import MeerkatError
from tests.engines import tiny
from tests.fuzz.model_files import Mutant, make_mutant

SECONDS = 30  # of processor time, a mutant
MEMORY = 400 << 20  # more than before
LONGEST = 1000  # characters of a refusal, but for its path
_WATCHED = ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.fork")
_ELSEWHERE = ("/outside/", "/etc/passwd", "/dev/zero")


@dataclass
class Report:
    """What became of a mutant: `said` is its refusal; faults must be none."""

    number: int
    outcome: str = "loaded"
    said: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Watch:
    """What happens to files, sockets and processes meanwhile, and what is printed."""

    def __init__(self, root: Path, printed: Path) -> None:
        self.root, self.printed, self.events = root, printed, list[str]()
        self.before: dict[str, object] = {}
        self.peak = 0
        sys.addaudithook(self._audit)

    def start(self) -> None:
        self.events.clear()
        os.truncate(self.printed, 0)
        self.before = self._files()
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, SECONDS)

    def stop(self) -> list[str]:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.flush()
        sys.stderr.flush()
        faults, after = list(self.events), self._files()
        if after != self.before:
            changed = {name for name, _ in after.items() ^ self.before.items()}
            faults.append(f"changed files: {sorted(changed)[:5]}")
        if printed := self.printed.read_text(errors="replace"):
            faults.append(f"printed: {printed[-1500:]}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak) << 10
        if grown > MEMORY // 2:
            faults.append(f"took {grown >> 20} MiB")
        return faults

    def _files(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for place, _, names in os.walk(self.root):
            for name in names:
                path = Path(place, name)
                state = path.lstat()
                found[str(path)] = (state.st_size, state.st_mtime_ns, state.st_ino, state.st_mode)
        return found

    def _audit(self, event: str, values: tuple[Any, ...]) -> None:
        elsewhere = event == "open" and any(part in str(values[0]) for part in _ELSEWHERE)
        ours = {tokenizer_trial.__name__, chat_template.__name__}
        other = event == "subprocess.Popen" and ours.isdisjoint(values[1])
        if elsewhere or other or event in _WATCHED:
            self.events.append(f"{event} {values!s:.200}")


def _is_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _can_be_shown(text: str, mutant: Mutant) -> bool:
    return text.isprintable() and len(text) - len(str(mutant.folder)) <= LONGEST


def _refusal(error: MeerkatError, mutant: Mutant) -> list[str]:
    said = str(error)
    faults = {
        "does not name its folder": str(mutant.folder) not in said,
        "has no remedy": not error.remedy,
        "is none: memory was asked for": _is_of_memory(error),
        "is too long, or cannot be printed": not _can_be_shown(said, mutant),
    }
    return [f"the refusal {what}: {said}" for what, wrong in faults.items() if wrong]


def _use(mutant: Mutant, out: Path, report: Report) -> None:
    """Load it, look at it, and where it is a model still, make a mask and an export."""
    try:
        loaded = load_model(mutant.folder)
        report.faults += [f"note: {note!r}" for note in loaded.notes if not _can_be_shown(note, mutant)]
        mask = make_mask(loaded, tiny.TEXTS, "magnitude", density=0.1, sequences=2, length=8)
        export_model(mutant.folder, mask, mask.theta_0 + 1, out)
    except MeerkatError as error:
        report.outcome, report.said = "refused", str(error)
        report.faults += _refusal(error, mutant)
    if mutant.number % 4 == 0:
        found: list[Finding] = []
        good = inspect_model(mutant.folder, dtype="float32", device="cpu", task=tiny.TASK, show=found.append)
        if good and report.outcome == "refused":
            report.faults.append("the look finds nothing wrong")
        report.faults += [f"finding: {one}" for one in found if not _can_be_shown(one.text + one.remedy, mutant)]


def look(mutant: Mutant, watch: Watch, out: Path) -> Report:
    """Put the mutant in its place, use the folder, and put the good file back."""
    report = Report(mutant.number)
    good = mutant.file.read_bytes() if mutant.file.exists() else None
    mutant.file.write_bytes(mutant.data)
    watch.start()
    before = time.process_time()
    try:
        _use(mutant, out, report)
    except BaseException:
        report.faults.append(traceback.format_exc()[-3000:])
    report.seconds = round(time.process_time() - before, 3)
    if out.exists():
        shutil.rmtree(out)
    report.faults += watch.stop()
    mutant.file.unlink(missing_ok=True)
    if good is not None:
        mutant.file.write_bytes(good)
    return report


def main(root: Path) -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    printed = root.with_name("printed.txt")
    with printed.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    good, work = root / "good", root / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was ended
    shutil.copytree(good, work)
    for model in ("causal", "encoder"):  # all that is loaded late
        load_model(work / model)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(root, printed)
    for order in sys.stdin:
        kind, start, stop = order.split()
        for number in range(int(start), int(stop)):
            mutant = make_mutant(kind, good, work, number)
            lines.write(json.dumps({"begun": number}) + "\n")
            lines.write(json.dumps(asdict(look(mutant, watch, root / "out"))) + "\n")
        lines.write("{}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
