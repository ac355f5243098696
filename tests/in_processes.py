"""Runs some settings, one after the other, in the processes of one launch; what a test starts by accelerate launch.

All but the first process may write nothing below the runs' folders. With a second argument, the last process ends
without a word as soon as a run has saved its state.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from loraprune.launch import here
from loraprune.pipeline import run
from loraprune.settings_file import settings_from

every = [settings_from(values) for values in json.loads(sys.argv[1])]
WRITING = {"open": 0, "os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0}  # which argument is changed
READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECTORY  # flags of `open` that change nothing


def refuse_writing(event, arguments):
    """Raise where a process that is not the first would change a file of a run."""
    if event not in WRITING or (event == "open" and not arguments[2] & ~READ_ONLY):
        return
    path = str(arguments[WRITING[event]])
    if any(path.startswith(one.output) for one in every):
        raise AssertionError(f"process {here().rank}: {event} of {path}")


def die_once_saved():
    """End this process as a machine that loses its power would."""
    while not (Path(every[0].output) / "state").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


if not here().first:
    sys.addaudithook(refuse_writing)
if sys.argv[2:] and here().rank == here().count - 1:
    threading.Thread(target=die_once_saved, daemon=True).start()
for settings in every:
    run(settings)
