"""Trains models whose losses and towers no causal language model has on simulated devices; writes losses as JSON.

Run by test_kinds.py: `python kinds_cases.py FOLDER RESULT.json`.
"""

import contextlib
import gc
import io
import json
import random
import sys
import traceback
from pathlib import Path

import numpy
import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

import balance_shim
from balance_shim.placement import colocations

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
STEPS, BATCH_SIZE = 4, 2
SMALL = {"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if transformers.__version__ >= "5" else {}


class Unseen(torch.utils.data.Dataset):
    """Examples that nobody can look at before training."""

    def __init__(self, example):
        self.example = example

    def __len__(self):
        return STEPS * BATCH_SIZE

    def __getitem__(self, number):
        return self.example(number)


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def question(number):
    ids = (11 * torch.arange(40) + number) % 500
    return {"input_ids": ids, "start_positions": number, "end_positions": number + 3}


def sound(number):
    return {"input_values": torch.cos(torch.arange(1600.0) * (number + 2) / 70), "labels": torch.arange(6) + 2 + number}


def with_pictures(numbers):
    ids = torch.stack([(11 * torch.arange(20) + number) % 480 + 4 for number in numbers])
    batch = {"input_ids": ids, "labels": ids.clone()}
    if numbers[0] // BATCH_SIZE % 2:
        batch["pixel_values"] = (
            torch.linspace(-1, 1, 4 * 3 * 28 * 28).view(1, 1, 4, 3, 28, 28).expand(BATCH_SIZE, -1, -1, -1, -1, -1)
        )
        batch["aspect_ratio_ids"] = torch.ones(BATCH_SIZE, 1, dtype=torch.long)
        batch["aspect_ratio_mask"] = torch.tensor([[[1, 0, 0, 0]]] * BATCH_SIZE)
        batch["cross_attention_mask"] = torch.ones(BATCH_SIZE, 20, 1, 4, dtype=torch.long)
    return batch


def bert():
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=512)
    return transformers.BertForQuestionAnswering(config), Unseen(question), None


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=24, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.3, mask_time_length=4, mask_time_min_masks=2, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config), Unseen(sound), None


def mllama():
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 2,
              "intermediate_size": 48, "vision_output_dim": 96, "image_size": 28, "patch_size": 14,
              "intermediate_layers_indices": [1, 2]}  # fmt: skip
    text = {**SMALL, **ROPE, "vocab_size": 512, "num_key_value_heads": 2, "cross_attention_layers": [1, 4],
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}  # fmt: skip
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=500)
    return transformers.MllamaForConditionalGeneration(config), list(range(STEPS * BATCH_SIZE)), with_pictures


def train(saved, model_class, dataset, collate, device_map):
    model = model_class.from_pretrained(saved, device_map=device_map)
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH_SIZE,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    set_seed(5)
    random.seed(5)
    numpy.random.seed(5)  # masks are drawn from it
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "map": dict(getattr(model, "hf_device_map", {}))}


def main():
    results = {}
    for make in (bert, wav2vec2, mllama):
        torch.manual_seed(0)
        model, dataset, collate = make()
        saved = folder / make.__name__
        model.save_pretrained(saved)
        for name, mode, device_map in (
            (f"{make.__name__}, one device", "off", None),
            (make.__name__, "balanced", "auto"),
        ):
            balance_shim.uninstall()
            colocations.forget()
            gc.collect()
            stderr, outcome = io.StringIO(), {}
            with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
                try:
                    balance_shim.install(mode=mode)
                    outcome = train(saved, type(model), dataset, collate, device_map)
                except Exception as failure:
                    outcome = {"error": str(failure), "traceback": traceback.format_exc()}
            results[name] = {**outcome, "log": stderr.getvalue().splitlines()}
    result_path.write_text(json.dumps(results))


main()
