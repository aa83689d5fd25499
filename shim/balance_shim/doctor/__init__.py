"""`balance-shim doctor`: what is installed, patched and there, and each problem with its remedy.

`libraries`, `accelerators` and `nccl` each return a section; `command` prints them.
"""
