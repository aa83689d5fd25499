"""Values that users choose among, as types; `settings` and `plan_options` accept exactly these."""

from typing import Literal

Mode = Literal["balanced", "map", "auto", "zero3", "off"]
PlanMode = Literal["balanced", "map", "auto"]  # whose map a plan has: ours, the user's, or transformers'
Tuning = Literal["full", "lora", "frozen"]
LossSetting = Literal["auto", "chunked", "full"]
Loss = Literal["chunked", "full", "fused"]
Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "optimizer", "all"]
Language = Literal["en", "zh"]
# What a message in `events.jsonl` is about; from "kept" on, what the monitor finds.
EventKind = Literal[
    "message", "does not fit", "out of memory", "repair", "move", "portions", "choice",
    "kept", "long batch", "longer batches", "fragmentation", "cache", "occupied", "others",
]  # fmt: skip
