"""SIGINT and SIGTERM: one word, 130 or 143, within two seconds, from the first moment on, also of a process 1."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.waiting import until

NUMBERS = [signal.SIGINT, signal.SIGTERM]
WORDS = {signal.SIGINT: "Interrupted\n", signal.SIGTERM: "Terminated\n"}
MODULES = ["meerkat_mq", "meerkat_mq.server", "meerkat_mq.node", "meerkat_mq.broker"]
AS_PROCESS_1 = ["unshare", "--pid", "--fork", "--kill-child"]
FRAME = """
import asyncio, hashlib, sys, time
from meerkat_mq.observe.start import start
start()
from meerkat_mq.observe.process import run_process, run_service, run_task

def in_a_thread():
    run_task(lambda: asyncio.to_thread(sleep))

def on_the_loop():
    async def main():
        sleep()
    run_task(main)

def as_a_service():
    return sys.exit(run_service(lambda: asyncio.to_thread(sleep)))

def stubborn():
    async def main():
        print("ready", flush=True)
        try:
            await asyncio.sleep(60)
        finally:
            print("ending", flush=True)
            await asyncio.sleep(60)
    return sys.exit(run_service(main))

def sleep():
    print("ready", flush=True)
    time.sleep(60)

def importing():
    try:
        sleep()
    except BaseException:
        raise ImportError("a library makes this of what ended it") from None

def half_imported():
    import os, pathlib, tempfile
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "compiled.py").write_text(
        "import os, time\\ntry:\\n print('ready', flush=True); time.sleep(60)\\nexcept BaseException:\\n os.abort()"
    )
    sys.path.insert(0, str(folder))
    import compiled

def deep():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one call, deaf to Python's handlers

run_process(globals()[sys.argv[1]])
"""


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A shell starts what it puts in the background deaf to Ctrl-C, and so were all that we start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, str, str]:
    """Exit code, output and errors; killed with all its children where it takes longer."""
    try:
        out, err = process.communicate(timeout=within_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("module", MODULES)
async def test_the_first_signal_counts_from_the_first_moment_on(module: str, number: signal.Signals) -> None:
    process = started(sys.executable, "-m", module, "--help")
    await until(lambda: heeds(process.pid, signal.SIGTERM))
    process.send_signal(number)
    assert ended(process, 10) == (128 + number, "", WORDS[number])


def allows_namespaces() -> bool:
    found = shutil.which(AS_PROCESS_1[0])
    return found is not None and subprocess.run([*AS_PROCESS_1, "true"], check=False).returncode == 0


@pytest.mark.skipif(not allows_namespaces(), reason="this system lets this user make no PID namespace")
@pytest.mark.parametrize("module", MODULES)
async def test_process_1_loses_no_signal_either(module: str) -> None:
    process = started(*AS_PROCESS_1, sys.executable, "-m", module, "--help")
    await until(lambda: psutil.Process(process.pid).children())
    (first,) = psutil.Process(process.pid).children()
    await until(lambda: heeds(first.pid, signal.SIGTERM))
    first.terminate()
    code, _, err = ended(process, 10)
    assert (code, err.splitlines()[0]) == (143, "Terminated")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("phase", ["sleep", "in_a_thread", "on_the_loop", "importing", "half_imported", "deep"])
async def test_a_command_is_interrupted_in_every_phase(phase: str, number: signal.Signals) -> None:
    process = started(sys.executable, "-c", FRAME, phase)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    code, _, err = ended(process, 20)
    assert (code, err) == (128 + number, WORDS[number])
    assert time.monotonic() - began < 4  # two seconds on an idle machine


async def test_a_service_that_ends_in_order_does_not_wait_for_its_threads() -> None:
    process = started(sys.executable, "-c", FRAME, "as_a_service")
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process, 5)
    assert (code, err) == (0, "")
    assert "stopped" in out  # structlog as it is before anybody sets it up


async def test_a_second_signal_ends_a_service_at_once() -> None:
    process = started(sys.executable, "-c", FRAME, "stubborn")
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.stdout.readline) == "ending\n"
    process.send_signal(signal.SIGINT)
    assert ended(process, 5) == (130, "", "Interrupted\n")
