"""Short trainings of one tiny model, one for each combination that docs/zero3-support.md names; all in one program.

python combinations.py --model FOLDER --output FOLDER --losses FILE [--batch-size 2] [--only NAME ...]

Writes one JSON object: the name of a combination -> the losses of its steps, or the error that ended it. The
error of a combination that is run alone ends the program.
"""

import argparse
import json
import shutil
from pathlib import Path

import peft
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--only", nargs="*", default=[])
options = parser.parse_args()

STEPS = 3
SEQUENCES = [torch.randint(5, 120, (10,), generator=torch.Generator().manual_seed(index)) for index in range(16)]
LAYERS = ["q_proj", "v_proj"]


def arguments(kind=TrainingArguments, **more):
    fixed = {
        "output_dir": options.output, "max_steps": STEPS, "per_device_train_batch_size": options.batch_size,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "bf16": False, "gradient_checkpointing": False, "seed": 42, "data_seed": 42,
    }  # fmt: skip
    return kind(**{**fixed, **more})


def causal(**more):
    return AutoModelForCausalLM.from_pretrained(options.model, **more)


def losses_of(trainer, logged=("loss",)):
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history for name in logged if name in entry]


def plain(model, **more):
    data = [{"input_ids": sequence, "labels": sequence} for sequence in SEQUENCES]
    return losses_of(Trainer(model, arguments(**more), train_dataset=data))


def adapted(config, **more):
    return plain(peft.get_peft_model(causal(), config), **more)


def lora(**more):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LAYERS, **more)


def learned(kind, **more):
    return adapted(kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **more), learning_rate=1e-1)


def compiled():
    return plain(causal(), torch_compile=True, torch_compile_backend="aot_eager")


def resumed():
    """Two steps, a checkpoint, and the rest in a trainer of its own."""
    folder = Path(options.output, "resumed")
    data = [{"input_ids": sequence, "labels": sequence} for sequence in SEQUENCES]
    more = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    first = Trainer(causal(), arguments(**{**more, "max_steps": 2}), train_dataset=data)
    first.train()
    second = Trainer(causal(), arguments(**more), train_dataset=data)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return [entry["loss"] for entry in second.state.log_history if "loss" in entry]


COMBINATIONS = {
    "full": lambda: plain(causal()),
    "lora": lambda: adapted(lora()),
    "dora": lambda: adapted(lora(use_dora=True)),
    "modules_to_save": lambda: adapted(lora(modules_to_save=["lm_head"])),
    "trainable_tokens": lambda: adapted(lora(trainable_token_indices=[*range(5, 60)])),
    "prompt": lambda: learned(peft.PromptTuningConfig),
    "p_tuning": lambda: learned(peft.PromptEncoderConfig, encoder_hidden_size=32),
    "prefix": lambda: learned(peft.PrefixTuningConfig),
    "ia3": lambda: adapted(
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    ),
    "checkpointing": lambda: plain(causal(), gradient_checkpointing=True),
    "compiled": compiled,
    "resumed": resumed,
    "bf16": lambda: plain(causal(), bf16=True, use_cpu=True),
    "accumulation": lambda: plain(causal(), gradient_accumulation_steps=2),
    "adafactor": lambda: plain(causal(), optim="adafactor"),
    "group_by_length": lambda: plain(causal(), **grouped()),
}


def grouped():
    fields = TrainingArguments.__dataclass_fields__
    return {"group_by_length": True} if "group_by_length" in fields else {"train_sampling_strategy": "group_by_length"}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(124))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def text(start, length):
    return " ".join(f"w{(start * 7 + place) % 120}" for place in range(length))


def with_trl(what, logged=("loss",), model=None, more_arguments=None, prepare=None, **more):
    import datasets
    import trl

    examples = {
        "SFT": lambda n: {"text": text(n, 12)},
        "DPO": lambda n: {"prompt": text(n, 6), "chosen": " " + text(n + 1, 6), "rejected": " " + text(n + 2, 6)},
        "KTO": lambda n: {"prompt": text(n, 6), "completion": " " + text(n + 1, 6), "label": n % 2 == 0},
        "Reward": lambda n: {"chosen": text(n + 1, 8), "rejected": text(n + 2, 6)},
        "GRPO": lambda n: {"prompt": text(n, 6)},
        "RLOO": lambda n: {"prompt": text(n, 6)},
    }[what]  # fmt: skip
    config = arguments(getattr(trl, f"{what}Config"), **(more_arguments or {}))
    data = datasets.Dataset.from_list([examples(number) for number in range(16)])
    trainer = getattr(trl, f"{what}Trainer")(
        causal() if model is None else model, args=config, train_dataset=data, processing_class=tokenizer(), **more
    )
    if prepare is not None:
        prepare(trainer)
    return losses_of(trainer, logged)


def by_position(completions, **_):
    """Rewards that differ within each pair of completions."""
    return [float(place % 2) for place in range(len(completions))]


def scoring():
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1)
    model.config.pad_token_id = 0
    return model


def reward_model():
    folder = Path(options.model).with_name("reward")
    if folder.exists():  # by the run in one process: under ZeRO-3 new weights are drawn in another order
        return str(folder)
    set_seed(7)
    made = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(options.model, num_labels=1))
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    set_seed(42)
    return str(folder)


def generating(what, rewards=by_position, **more):
    """Train with TRL's `what`; return losses and rewards.

    The first loss after a generation is about 0, so each generation is used twice.
    """
    more = {"num_generations": 2, "max_completion_length": 4, "beta": 0.04, "num_iterations": 2, **more}
    more["per_device_train_batch_size"] = 2 * options.batch_size
    return with_trl(what, ("loss", "reward"), options.model, more, fixed_completions, reward_funcs=rewards)


def fixed_completions(trainer):
    """Have the model generate, and put tokens in place that one process and several agree on."""
    plain_generate = trainer.model.generate

    def generate(input_ids, **more):
        tokens = plain_generate(input_ids=input_ids, min_new_tokens=4, **more)
        new = tokens[:, input_ids.shape[1] :]
        places = torch.arange(new.shape[1]) * 3 + torch.arange(len(new))[:, None] % 2 * 11
        new[:] = 5 + (input_ids[:, -1:] + places) % 110
        return tokens

    trainer.model.generate = generate


COMBINATIONS |= {
    "sft": lambda: with_trl("SFT"),
    "sft_path": lambda: with_trl("SFT", model=options.model),
    "sft_lora": lambda: with_trl("SFT", peft_config=lora()),
    "dpo": lambda: with_trl("DPO"),
    "dpo_lora": lambda: with_trl("DPO", peft_config=lora()),
    "kto": lambda: with_trl("KTO", more_arguments={"per_device_train_batch_size": 2 * options.batch_size}),
    "reward": lambda: with_trl("Reward", model=scoring()),
    "dpo_path": lambda: with_trl("DPO", model=options.model),
    "grpo": lambda: generating("GRPO"),
    "grpo_reward_model": lambda: generating("GRPO", reward_model()),
    "rloo": lambda: generating("RLOO"),
    "rloo_checkpointing": lambda: generating("RLOO", gradient_checkpointing=True),
}

results = {}
for name, run in COMBINATIONS.items():
    if options.only and name not in options.only:
        continue
    set_seed(42)
    try:
        results[name] = run()
    except Exception as error:
        if len(options.only) == 1:
            raise
        results[name] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    print(name, results[name], flush=True)
    shutil.rmtree(Path(options.output, "resumed"), ignore_errors=True)
Path(options.losses).write_text(json.dumps(results))
