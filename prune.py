"""Prune: the plan's script; `train` and everything behind it is loraprune.scripts."""

from loraprune.scripts import main
from loraprune.scripts import train as train

if __name__ == "__main__":
    raise SystemExit(main())
