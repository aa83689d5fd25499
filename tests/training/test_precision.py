"""BALANCE_PRECISION: what weights load as, what products are computed in, and when losses are scaled."""

import pytest

from tests.training import test_micro_batch
from tests.training.test_micro_batch import train

folder = test_micro_batch.folder
TWO = {"BALANCE_SIMULATE": "2x1GiB"}


@pytest.mark.parametrize(
    ("precision", "options", "more", "loaded", "product", "arguments"),
    [("bf16", [], {}, "bfloat16", "bfloat16", [True, False]),
     pytest.param("bf16", ["lora"], {}, "bfloat16", "bfloat16", [True, False], marks=pytest.mark.exhaustive),
     pytest.param("fp32", [], {}, "float32", "float32", [False, False], marks=pytest.mark.exhaustive)],
    ids=["bf16", "bf16-lora", "fp32"],
)  # fmt: skip
def test_weights_and_products(folder, precision, options, more, loaded, product, arguments):
    """One word sets the dtype of loading and the mixed precision of a script that names neither."""
    result, _ = train(folder, *options, BALANCE_PRECISION=precision, **TWO, **more)
    assert result["loaded"] == f"torch.{loaded}"
    assert f"torch.{product}" in result["products"]
    assert result["arguments"] == arguments and result["steps"] == 2


def test_what_a_processor_cannot_do_is_said(folder):
    """The CPU has no fp16 training: bf16 is the nearest, in one line."""
    result, stderr = train(folder, "cpu", BALANCE_PRECISION="fp16")
    assert result["loaded"] == "torch.bfloat16" and result["arguments"] == [True, False]
    assert stderr.count("the CPU does not support it; using bf16") == 1
