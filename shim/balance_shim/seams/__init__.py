"""The seams: patches of other libraries, one module per patched module.

A seam module has `apply(module)`, which patches what it finds in the leaf module through `registry.replace`, and
raises `guard.SeamMoved` when that is not there any more. It is imported only once its leaf module has been.
"""

# Leaf modules, never "transformers": that name is swapped for a lazy module, and touching it would load things early.
SEAMS = {
    "transformers.modeling_utils": "balance_shim.seams.loading",
    "transformers.generation.utils": "balance_shim.seams.generation",
    "transformers.training_args": "balance_shim.seams.arguments",
    "transformers.trainer": "balance_shim.seams.trainer",
    "transformers.loss.loss_utils": "balance_shim.seams.loss",
    "transformers.integrations.sdpa_attention": "balance_shim.seams.grouped_attention",
    "transformers.integrations.deepspeed": "balance_shim.seams.deepspeed_config",
    "peft.peft_model": "balance_shim.seams.peft_model",
    "peft.tuners.lora.model": "balance_shim.seams.peft_lora",
    "peft.tuners.trainable_tokens.layer": "balance_shim.seams.peft_tokens",
    "accelerate.state": "balance_shim.seams.accelerate_state",
    "accelerate.accelerator": "balance_shim.seams.accelerator",
    "deepspeed.comm.torch": "balance_shim.seams.deepspeed_comm",
    "deepspeed.runtime.zero.partition_parameters": "balance_shim.seams.deepspeed_scalars",
    "deepspeed.runtime.engine": "balance_shim.seams.deepspeed_engine",
    "swift.cli.main": "balance_shim.seams.launchers",
    "llamafactory.launcher": "balance_shim.seams.launchers",
    "axolotl.train": "balance_shim.seams.axolotl_saving",
}

# The oldest and the newest version that has run. A newer one whose seams are all present is no problem.
KNOWN_TO_WORK = {
    "transformers": ("4.45.2", "5.24.0"),
    "accelerate": ("1.0.1", "1.15.0"),
    "peft": ("0.15.2", "0.21.2"),
    "deepspeed": ("0.16.9", "0.19.8"),
    "swift": ("3.12.0", "4.6.0"),
    "llamafactory": ("0.9.4", "0.9.5"),
    "axolotl": ("0.19.0", "0.21.0"),
}
