"""What the trainings of the matrix share: their command line, data, arguments, and the record that they leave.

    SCRIPT NAME MODELS OUTPUT

`ROWS` sequences per device, so that ranks and one process have the same global batch. Nothing here knows of the shim.
"""

import inspect
import json
import os
import random
import sys
from pathlib import Path

NAME, MODELS, OUTPUT = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
ROWS = int(os.environ["ROWS"])
TOKENS = 48


def arguments(kind, **more):
    """Return training arguments of the class `kind`; those of `more` that this version does not know are left out."""
    chosen = {
        "output_dir": str(OUTPUT),
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "learning_rate": 1e-3,
        "seed": 1,
        "optim": "adamw_torch",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in chosen.items() if name in known})


def words(start, count):
    return " ".join(f"w{(start * 7 + place * 3) % 490}" for place in range(count))


def token_rows(count=32):
    numbers = random.Random(0)
    rows = [[numbers.randrange(3, 490) for _ in range(TOKENS)] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def tokenizer(folder="llama"):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / folder)


def with_tokenizer(trainer, folder="llama"):
    """Return the trainer's keyword for a tokenizer, whose name has changed over the versions."""
    known = inspect.signature(trainer).parameters
    return {"processing_class" if "processing_class" in known else "tokenizer": tokenizer(folder)}


def train(trainer, **record):
    """Train, save to OUTPUT/saved, and leave the losses in OUTPUT/losses.json."""
    trainer.train()
    trainer.save_model(str(OUTPUT / "saved"))
    history = trainer.state.log_history
    losses = [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]
    if trainer.is_world_process_zero():
        write(losses, processes=trainer.args.world_size, **record)


def write(losses, **record):
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "losses.json").write_text(json.dumps({"losses": losses, **record}))
