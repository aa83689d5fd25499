"""Models and parts of models that are called outside of an engine's forward, under BALANCE_MODE=zero3 on two ranks."""

import json
import sys
import time

import pytest
import torch
import transformers
from packaging.version import Version

from tests import models
from tests.end_to_end.run import SHIM, run_command
from tests.zero.test_training import SAME, SCRIPTS, TWO, expect_same_weights

pytestmark = pytest.mark.exhaustive


def write_models(folder):
    """Write one small model of each kind, with random weights."""
    models.saved_llama(folder / "llama", num_hidden_layers=2, vocab_size=128)
    torch.manual_seed(0)
    classifier = transformers.LlamaConfig(
        **{**models.SIZES, "num_hidden_layers": 2, "vocab_size": 128, "num_key_value_heads": 2},
        num_labels=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(classifier).save_pretrained(folder / "classifier")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 18},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    whisper = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=16, max_source_positions=50,
        max_target_positions=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(whisper).save_pretrained(folder / "whisper")
    wav2vec2 = transformers.Wav2Vec2Config(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, ctc_loss_reduction="mean",
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(wav2vec2).save_pretrained(folder / "wav2vec2")


def test_models_of_all_kinds_and_their_parts(tmp_path):
    """What two processes compute is what one computes: Whisper, weight norm, scalars, heads of another size, parts of
    models without a trainer, and losses from weights; what such a model saves loads in plain transformers.
    """
    write_models(tmp_path)
    logged = []
    for name, prefix, environment, batch in (("alone", [], {}, "2"), ("two", SHIM, TWO, "1")):
        losses = tmp_path / f"{name}.jsonl"
        arguments = ["--models", str(tmp_path), "--output", str(tmp_path / name), "--losses", str(losses)]
        command = [sys.executable, *prefix, str(SCRIPTS / "parts.py"), *arguments, "--batch-size", batch]
        outcome = run_command(command, environment).expect_success()
        logged.append([json.loads(line) for line in losses.read_text().splitlines()])
    (seen, trained), (two_seen, two_trained) = logged
    refused = two_seen.pop("untrained")
    assert seen.pop("untrained") == "computed" and "its gradient would be lost" in refused
    assert two_seen.pop("map") == [""]
    del seen["map"]
    assert two_seen.keys() == seen.keys()
    for name, value in seen.items():
        assert two_seen[name] == pytest.approx(value, rel=1e-4), name
    assert two_trained["speech"] == pytest.approx(trained["speech"], rel=1e-4)
    assert two_trained["loss"] == pytest.approx(trained["loss"], **SAME)
    assert two_trained["grad_norm"] == pytest.approx(trained["grad_norm"], rel=1e-4)
    unpartitioned = ["LlamaForSequenceClassification"]
    if Version(transformers.__version__) >= Version("5"):  # 4.51 gathers more before it initializes
        unpartitioned += ["WhisperForConditionalGeneration", "Wav2Vec2ForCTC"]
    for kind in unpartitioned:
        assert outcome.stderr.count(f"{kind} cannot be loaded in partitions") == 1, kind
    alone, two = (
        transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / name / "wav2vec2").state_dict()
        for name in ("alone", "two")
    )
    expect_same_weights(two, alone)


ALONE = {
    "merge": "merging adapters",
    "call": "a call of LlamaForCausalLM",
    "generate": "LlamaForCausalLM.generate",
    "embed": "a call of LlamaForCausalLM",
    "value": "`norm` of a partitioned weight",
    "save": "saving the model",
    "evaluate": "an evaluation or prediction",
}


@pytest.mark.parametrize(
    ("act", "other_rank"),
    [pytest.param("merge", "leave", marks=pytest.mark.sweep), ("generate", "leave"), ("evaluate", "wait")],
)
def test_one_rank_alone(act, other_rank, tmp_path):
    """One line names the rank and the remedy: at once where the other rank has ended, else before the time-out."""
    models.saved_llama(tmp_path / "model", num_hidden_layers=1, vocab_size=64)
    argv = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--act", act]
    argv += ["--other-rank", other_rank]
    began = time.monotonic()
    command = [sys.executable, *SHIM, str(SCRIPTS / "alone.py"), *argv]
    outcome = run_command(command, {**TWO, "BALANCE_NCCL_TIMEOUT": "1800" if other_rank == "leave" else "50"})
    assert outcome.exit_code != 0 and time.monotonic() - began < 240
    line = next(line for line in outcome.stderr.splitlines() if f"rank 0 came to {ALONE[act]}" in line)
    assert ("rank 1 ended without it" if other_rank == "leave" else "rank 1 did not come within 45 s") in line
    assert "Let every rank do it" in line
    if other_rank == "wait":
        assert f"waits in {ALONE[act]} for rank 1" in outcome.stderr
