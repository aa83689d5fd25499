"""An ordinary training script: loads a model over all devices and trains it for a few steps on made-up rows.

    python benchmarks/train.py FOLDER --seq-len 4096 --lora --checkpointing

It knows nothing of balance_shim and nothing of simulated devices: what the benchmarks measure is what happens to such
a script. The rows have one length. For models that see, about five eighths of each row are the tokens of pictures.
"""

import argparse
import json

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# The linear layers of the decoder. The vision towers have layers of the same names.
LANGUAGE_LAYERS = r"^(?!.*(visual|vision)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
PICTURE_SHARE = 5 / 8


class LoadingPeaks(TrainerCallback):
    """Prints what each device held at most before the first step, and lets the peaks of training start from there."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            device = torch.get_device_module()
            places = range(device.device_count())
            print(json.dumps({"loading_peaks": [device.max_memory_allocated(place) for place in places]}))
            for place in places:
                device.reset_peak_memory_stats(place)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--device-map", default="auto")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 on the decoder's linear layers")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--output", default="trained")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=options.output,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.steps,
        optim=options.optim,
        gradient_checkpointing=options.checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    library_sees = config.model_type in ("qwen2_5_vl", "internvl")
    auto_class = AutoModelForImageTextToText if library_sees else AutoModelForCausalLM
    model = auto_class.from_pretrained(
        options.model, dtype=torch.bfloat16, device_map=options.device_map, trust_remote_code=True
    )
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LANGUAGE_LAYERS))

    examples = [EXAMPLES.get(config.model_type, text_example)(config, options.seq_len)]
    examples *= options.steps * options.batch_size * options.accumulation
    Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[LoadingPeaks()]
    ).train()
    print(json.dumps({"hf_device_map": getattr(model, "hf_device_map", None)}, default=str))


def text_example(config, length):
    ids = torch.randint(100, 30000, (length,))
    return {"input_ids": ids, "labels": ids}


def qwen_vl_example(config, length):
    """Pictures of 896 x 1120 pixels: 64 x 80 patches, which become 1280 tokens."""
    vision = config.vision_config
    grid = torch.tensor([1, 64, 80])
    tokens = int(grid.prod()) // vision.spatial_merge_size**2
    pictures = max(1, round(length * PICTURE_SHARE / tokens))
    example = picture_example(config, length, pictures, tokens)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        **example,
        "mm_token_type_ids": (example["input_ids"] == config.image_token_id).long(),
        "pixel_values": torch.zeros(pictures * int(grid.prod()), values),
        "image_grid_thw": grid.repeat(pictures, 1),
    }


def internvl_example(config, length):
    """Tiles of 448 x 448 pixels, which become 256 tokens each."""
    height, width = config.vision_config.image_size
    tokens = height * width // config.vision_config.patch_size[0] ** 2 // 4
    tiles = max(1, round(length * PICTURE_SHARE / tokens))
    return {**picture_example(config, length, tiles, tokens), "pixel_values": torch.zeros(tiles, 3, height, width)}


def internvl_chat_example(config, length):
    example = internvl_example(config, length)
    return {**example, "image_flags": torch.ones(len(example["pixel_values"]), 1, dtype=torch.long)}


def picture_example(config, length, pictures, tokens):
    """Pictures of `tokens` tokens each with words around them, then the answer; only words count in the loss."""
    example = text_example(config, length)
    ids, labels = example["input_ids"].clone(), example["labels"].clone()
    start = 4
    for _ in range(pictures):
        ids[start : start + tokens] = config.image_token_id
        labels[start : start + tokens] = -100
        start += tokens + 2  # the marks at the end of one picture and the start of the next
    if start > length:
        raise SystemExit(f"an example of {length} tokens has no room for pictures of {pictures} x {tokens}")
    return {"input_ids": ids, "labels": labels}


EXAMPLES = {"qwen2_5_vl": qwen_vl_example, "internvl": internvl_example, "internvl_chat": internvl_chat_example}


def collate(examples):
    """Tokens as a matrix; what belongs to pictures one after the other, as processors do it."""
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        of_pictures = name in ("pixel_values", "image_grid_thw", "image_flags")
        batch[name] = torch.cat(values) if of_pictures else torch.stack(values)
    return batch


if __name__ == "__main__":
    main()
