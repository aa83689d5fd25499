"""Grouped queries on simulated devices, with and without the shim: the check of the file below."""

from pathlib import Path

from tests.simulation.child import results_of

SCRIPT = Path(__file__).with_name("grouped_attention_checks.py")


def test_placed_models_repeat_keys_and_values(tmp_path):
    """float32 has no fused kernel for grouped queries: the shim's model keeps no S x S values and has the same loss."""
    results = results_of(SCRIPT, tmp_path)
    assert results == {"check_placed_models_repeat_keys_and_values": None}, results
