"""`python -m balance_shim`: the same as the command `balance-shim`."""

from balance_shim.cli import main

raise SystemExit(main())
