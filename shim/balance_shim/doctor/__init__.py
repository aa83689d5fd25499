"""`balance-shim doctor`: versions, patches and devices, with a remedy for each problem.

`libraries`, `accelerators` and `nccl` each return a section; `command` prints them.
"""
