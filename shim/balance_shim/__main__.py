"""`python -m balance_shim`: the same as the command `balance-shim`."""

from .cli.main import main

raise SystemExit(main())
