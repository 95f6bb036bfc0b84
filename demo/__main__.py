"""The demo from start to verdict: `python -m demo [--broker URL] [--folder FOLDER]`, in about twenty seconds."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from rich.console import Console

from penstock import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--broker", default=os.environ.get("BROKER"), help="URL; $BROKER, else a fresh SQLite file")
    parser.add_argument(
        "--folder", default="demo-run", help="for everything it writes; made anew (default: %(default)s)"
    )
    flags = parser.parse_args()
    if importlib.util.find_spec("psutil") is None:
        print("error: the demo reads this machine with psutil: pip install 'penstock[demo]'", file=sys.stderr)
        return 2
    os.environ["DEMO_FOLDER"] = flags.folder  # read on import, here as in the children

    from demo.play import Play, Stuck

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)  # so that the children end with us
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # in a terminal without Unicode, signs may be lost, not the demo
    console = Console(highlight=False)
    try:
        with Play(console, flags.broker) as play:
            return 0 if play.perform() else 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stuck as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
