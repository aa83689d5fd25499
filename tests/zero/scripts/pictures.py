"""Train a small vision-language model on rows of which some have a picture and some have not.

python pictures.py --kind llava --output FOLDER --losses FILE [--batch-size 2] [--frozen] [--uneven]
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--kind", choices=["llava", "qwen", "qwen3", "mllama", "audio"], required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--frozen", action="store_true")
parser.add_argument("--uneven", action="store_true", help="sequences have different numbers of labels")
options = parser.parse_args()

PICTURE, TOKENS, LENGTH = 500, 12 if options.kind == "audio" else 4, 24
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=PICTURE)
    return transformers.LlavaForConditionalGeneration(config)


def qwen():
    vision = {"hidden_size": 32, "out_hidden_size": 64, "depth": 2, "num_heads": 2, "intermediate_size": 48}
    ropes = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5_VLConfig(**TEXT, rope_scaling=ropes, vision_config=vision)
    config.image_token_id, config.video_token_id, config.vision_start_token_id = PICTURE, 501, 502
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3():
    """Features of inner layers of the tower go to the language model, too (DeepStack)."""
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
        "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64,
    }  # fmt: skip
    ropes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 16, "rope_parameters": ropes}
    tokens = {
        "image_token_id": PICTURE,
        "video_token_id": 501,
        "vision_start_token_id": 502,
        "vision_end_token_id": 503,
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen3VLForConditionalGeneration(config)


def audio():
    """Its forward calls the tower itself. 48 frames are 12 tokens."""
    sound = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
        "max_source_positions": 24,
    }  # fmt: skip
    text = {"model_type": "qwen2", **TEXT}
    config = transformers.Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=PICTURE)
    return transformers.Qwen2AudioForConditionalGeneration(config)


def mllama():
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 48, "vision_output_dim": 64, "image_size": 28, "patch_size": 14,
        "intermediate_layers_indices": [1],
    }  # fmt: skip
    text = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "pad_token_id": 0}
    ropes = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MllamaConfig(
        vision_config=vision, text_config={**text, "rope_scaling": ropes}, image_token_index=PICTURE
    )
    model = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "cross_attn" in name and name.endswith("gate"):  # zero at first, which would hide what these layers do
            torch.nn.init.constant_(parameter, 0.5)
    return model


def example(index):
    """In steps of two rows, the first has a picture, then the second, then both, then none."""
    ids = torch.arange(LENGTH) * 7 % 400 + index
    picture = index in (0, 3, 4, 5)
    if picture:
        ids[3 : 3 + TOKENS] = PICTURE
    return {"input_ids": ids, "picture": picture, "index": index}


def collate(examples):
    ids = torch.stack([example["input_ids"] for example in examples])
    labels = ids.clone()
    labels[:, 3 : 3 + TOKENS] = -100
    if options.uneven:
        labels[[example["index"] % 2 == 1 for example in examples], 18:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    count = sum(example["picture"] for example in examples)
    if count and options.kind == "llava":
        batch["pixel_values"] = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28).repeat(count, 1, 1, 1)
    elif count and options.kind == "mllama":
        batch["pixel_values"] = torch.linspace(-1, 1, 4 * 3 * 28 * 28).view(1, 1, 4, 3, 28, 28)
        batch["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
        batch["aspect_ratio_mask"] = torch.tensor([[[1, 0, 0, 0]]])
        batch["cross_attention_mask"] = torch.ones(1, LENGTH, 1, 4, dtype=torch.long)
    elif count and options.kind == "audio":
        batch["input_features"] = torch.linspace(-1, 1, 16 * 48).view(1, 16, 48).repeat(count, 1, 1)
        batch["feature_attention_mask"] = torch.ones(count, 48, dtype=torch.long)
    elif count:
        batch["pixel_values"] = torch.linspace(-1, 1, 16 * 1176).view(16, 1176).repeat(count, 1)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
    if options.kind == "qwen3":
        batch["mm_token_type_ids"] = (ids == PICTURE).long()
    return batch


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


set_seed(42)
model = {"llava": llava, "qwen": qwen, "qwen3": qwen3, "mllama": mllama, "audio": audio}[options.kind]()
if options.frozen:
    towers = ("visual", "vision_tower")
    next(part for name, part in model.named_modules() if name.rpartition(".")[2] in towers).requires_grad_(False)
arguments = TrainingArguments(
    output_dir=options.output, max_steps=4, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    gradient_accumulation_steps=options.accumulation,
)  # fmt: skip
trainer = InOrder(
    model=model, args=arguments, train_dataset=[example(index) for index in range(8)], data_collator=collate
)
trainer.train()
if arguments.process_index == 0:
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))
