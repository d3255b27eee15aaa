"""A rank that does what its arguments say: writes down who it is, then ends, fails, dies or waits for a signal.

Usage: python -m obedient_rank FOLDER FATE...   with one fate for each rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from reformer_dist.process.exit_status import INTERRUPTED, PREEMPTED
from reformer_dist.process.signals import SIGNALS, exit_on_signal, terminate_with_launcher


def main() -> None:
    folder, fates = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ["RANK"])
    kept = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    attempts = len(list(folder.glob(f"rank{rank}.*.json")))
    name, _, number = fates[rank].partition("=")

    def save_and_leave(signum: int, frame: object) -> None:
        (folder / f"saved{rank}").write_text(signal.Signals(signum).name)
        sys.exit(int(number))

    def work() -> None:
        """As training does: saves for a moment at a signal; a second SIGINT ends it."""
        received = []

        def note(signum: int, frame: object) -> None:
            if received and signum == signal.SIGINT:
                os._exit(INTERRUPTED)
            received.append(signum)

        for signum in SIGNALS:
            signal.signal(signum, note)
        deadline = time.monotonic() + float(number)
        while time.monotonic() < deadline and not received:
            time.sleep(0.01)
        if received:
            (folder / f"saved{rank}").write_text("")
            time.sleep(0.1)
            os._exit(PREEMPTED)
        os._exit(0)

    if name == "work":
        exit_on_signal()
        terminate_with_launcher()
    elif name == "wait":
        terminate_with_launcher()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, save_and_leave)
    (folder / f"rank{rank}.{attempts}.json").write_text(json.dumps({key: os.environ.get(key) for key in kept}))
    if name == "work":
        work()
    elif name in ("wait", "deaf"):
        time.sleep(60)
    elif name == "die" or (name == "die-once" and attempts == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "end":
        sys.exit(int(number))


if __name__ == "__main__":
    main()
