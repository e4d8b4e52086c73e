"""Datasets of the Hugging Face hub by their ids: fetched by a child that can be killed, through the `datasets` cache.

The library waits for as long as the hub keeps a connection. So this file is also the child's program: it loads a
dataset and writes a line that says what went wrong, empty where nothing did, and then the rows as an Arrow stream.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from common.errors import OperatorError, WaitTimeout
from common.wait import Wait

log = logging.getLogger(__name__)

FETCH_LIMIT_S = 60.0
"""Longest time in which not a byte more of a dataset comes to lie on the disk."""
HUB_TIMEOUT_S = 10.0
"""Longest wait for the hub's first word; without one, or after an error of its own, only what is cached can be read."""
EXPECTED_SOURCE = "a .jsonl or .parquet file, a folder of .parquet files, or a dataset id owner/name[:config]"
_LOOK_S = 0.5
_CHUNK_BYTES = 1 << 16
"""A download is written this often; the library's 10 MiB would look like standing still on a slow line."""
_BATCH_ROWS = 1024
_MAX_REASON_CHARS = 300


def fetch_batches(source: str, split: str, *, limit_s: float = FETCH_LIMIT_S) -> Iterator[Any]:
    """One split of a dataset as Arrow batches. Raises OperatorError where it cannot be had, or does not come on."""
    from huggingface_hub import constants
    from pyarrow import ipc  # pyright: ignore

    name = f"{source}[{split}]"
    log.info("fetching %s (split %s) from %s", source, split, constants.ENDPOINT)
    wait = Wait(constants.ENDPOINT, limit_s=limit_s)
    command = [sys.executable, "-W", "ignore", "-m", "common.hub", source, split]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            mistake = _verdict_of(child, wait, name)
            if mistake:
                raise OperatorError(f"{name}: cannot be fetched ({mistake}), expected {EXPECTED_SOURCE}")
            yield from cast(Any, ipc).open_stream(child.stdout)
            if child.wait(limit_s):  # a stream that breaks off looks like one that ends
                raise OperatorError(f"{name}: cannot be read (exit code {child.returncode}), expected all of its rows")
        except WaitTimeout as error:
            raise OperatorError(f"{error} (HF_HUB_OFFLINE=1 reads what is cached)") from error
        finally:
            child.kill()


def in_one_line(error: Exception) -> str:
    """What another library says, short enough for a message."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON_CHARS else text[: _MAX_REASON_CHARS - 1] + "…"


def _verdict_of(child: "subprocess.Popen[bytes]", wait: Wait, name: str) -> str:
    """The child's first line. Raises WaitTimeout where the dataset stops growing before that."""
    assert child.stdout
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    num_bytes = 0
    while not poll.poll(_LOOK_S * 1000):
        num_bytes, before = _num_bytes(_folders_of(name)), num_bytes
        if num_bytes != before:
            wait.progress()
        wait.check(f"more of {name}")
    line = child.stdout.readline()
    return json.loads(line) if line else f"its loading ended with exit code {child.wait()}"


def _folders_of(name: str) -> Sequence[Path]:
    """Where the libraries keep what they have of a dataset."""
    from huggingface_hub import constants

    owner, _, rest = name.partition("/")
    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    download = Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{rest.split('[')[0].split(':')[0]}"
    return [download, datasets / "downloads", *datasets.glob(f"{owner}___*")]


def _num_bytes(folders: Sequence[Path]) -> int:
    total = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with suppress(OSError):  # renamed meanwhile
                total += path.lstat().st_size
    return total


def _load(source: str, split: str) -> Any:
    """One split by its id; where the hub does not answer, what is cached of it. Raises OperatorError with why not."""
    import datasets  # pyright: ignore[reportMissingTypeStubs]
    import huggingface_hub
    import huggingface_hub.constants

    for library in cast(Any, datasets), cast(Any, huggingface_hub):
        library.logging.set_verbosity(50)  # what goes wrong is told below, in one line
        if not sys.stderr.isatty():
            library.utils.disable_progress_bars()
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    name, _, config = source.partition(":")
    reason = _unreachable(name)
    if reason:
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # else every file is asked for six times, with pauses
    try:
        dataset = cast(Any, datasets).load_dataset(name, config or None, split=split)
        return dataset.with_format("arrow")  # as stored: media columns stay undecoded
    except Exception as error:
        is_uncached = reason and isinstance(error, ConnectionError)
        got = f"not cached, and the hub cannot be reached: {reason}" if is_uncached else in_one_line(error)
        raise OperatorError(got or type(error).__name__) from error


def _unreachable(name: str) -> str:
    """Why the hub cannot be asked for the dataset `name`; empty where it answered, be it with a refusal."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        return in_one_line(error) if error.response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR else ""
    except Exception as error:
        return in_one_line(error) or type(error).__name__
    return ""


def _write(source: str, split: str) -> None:
    from pyarrow import ipc  # pyright: ignore

    def say(mistake: str) -> None:
        sys.stdout.buffer.write(json.dumps(mistake).encode() + b"\n")
        sys.stdout.buffer.flush()

    try:
        dataset = _load(source, split)
    except OperatorError as error:
        say(str(error))
        return
    say("")
    with cast(Any, ipc).new_stream(sys.stdout.buffer, dataset[:0].schema) as stream:
        for table in dataset.iter(batch_size=_BATCH_ROWS):
            stream.write_table(table)


def _leave_with_the_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """The child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a word: the parent was interrupted too
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    code = 1
    try:
        _write(*sys.argv[1:])
        sys.stdout.buffer.flush()
        code = 0
    finally:
        os._exit(code)  # the libraries' threads may still wait for the hub


if __name__ == "__main__":
    main()
