"""Everything that touches other people's classes, one module a library class.

A seam module has `apply(module)`, which patches what it finds in the leaf module through `registry.replace`, and
raises `guard.SeamMoved` when that is not there any more. It is imported only once its leaf module has been.
"""

# Leaf modules, never "transformers": that name is swapped for a lazy module, and touching it would load things early.
SEAMS = {
    "transformers.modeling_utils": "balance_shim.seams.loading",
    "transformers.training_args": "balance_shim.seams.arguments",
    "transformers.trainer": "balance_shim.seams.trainer",
    "transformers.loss.loss_utils": "balance_shim.seams.loss",
}

KNOWN_TO_WORK = {"transformers": "4.45.2 to 5.23.0"}
