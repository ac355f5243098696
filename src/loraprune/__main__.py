"""`python -m loraprune`: the command line, where the script `loraprune` is not on the path."""

from loraprune.cli import main

raise SystemExit(main())
