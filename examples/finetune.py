"""Fine-tune a causal language model on your own text with the Hugging Face Trainer, on whatever devices there are.

    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_text.jsonl

`--data` is a JSONL file whose rows are {"text": ...}.
"""

import argparse
import json

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class PrintLoss(TrainerCallback):
    """One short line for each logged step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--data", required=True, help='JSONL file of {"text": ...}')
    parser.add_argument("--output", default="finetuned", help="folder for checkpoints")
    parser.add_argument("--losses", help="write the training log to this JSONL file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--save", action="store_true", help="save the model after the last step")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")

    dataset = load_dataset("json", data_files=options.data, split="train")
    dataset = dataset.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.sequence_length),
        batched=True,
        remove_columns=dataset.column_names,
    )

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=options.seed,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[PrintLoss()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    if options.save:
        trainer.save_model()
        tokenizer.save_pretrained(options.output)
    if options.losses:
        with open(options.losses, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)


if __name__ == "__main__":
    main()
