"""`BALANCE_MODE=zero3`: DeepSpeed ZeRO-3 over all devices, for an unchanged script.

In the order in which it happens: `relaunch` makes several processes of one, `session` has DeepSpeed and the process
group ready before the first model loads, `config` is what DeepSpeed is told, `loading` and `engine` check that it came
true, `desync` explains ranks that wait for each other in different places.
"""
