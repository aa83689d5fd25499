"""Fine-tune a causal language model with the Hugging Face Trainer."""

import argparse
import json

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--losses")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--save", action="store_true", help="save a checkpoint after the last step")
    options = parser.parse_args()

    set_seed(options.seed)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps" if options.save else "no",
        save_steps=options.steps,
        report_to=[],
        seed=options.seed,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset = load_dataset("json", data_files=options.data, split="train")
    dataset = dataset.map(
        lambda examples: tokenizer(examples["text"], truncation=True, max_length=options.sequence_length),
        batched=True,
        remove_columns=dataset.column_names,
    )

    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()

    if options.losses:
        with open(options.losses, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)


if __name__ == "__main__":
    main()
