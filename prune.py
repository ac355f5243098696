"""Prune: the plan's script; `train` and everything behind it is loraprune.plan."""

from loraprune.plan import main
from loraprune.plan import train as train

if __name__ == "__main__":
    raise SystemExit(main())
