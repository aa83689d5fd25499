"""The command `balance-shim`: its subcommands, and how a program is started with the shim."""
