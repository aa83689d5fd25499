"""The steps of transformers' example scripts run_clm, run_translation and run_classification, on made-up text.

python examples.py --models FOLDER --output FOLDER --losses FILE [--batch-size 2]

Writes one JSON object: task -> losses of the steps, metrics, and the shapes of the weights as the script sees them.
"""

import argparse
import json
import math
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--models", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
options = parser.parse_args()

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(120))]
VOCABULARY = 140  # of the models: more than the tokenizer has, as those of Qwen and T5


def arguments(kind, task, *more):
    """As from the command line."""
    size = str(options.batch_size)
    values = ["--output_dir", f"{options.output}/{task}", "--do_train", "--do_eval", "--max_steps", "3",
             "--per_device_train_batch_size", size, "--per_device_eval_batch_size", size, "--learning_rate", "1e-3",
             "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true",
             *more]  # fmt: skip
    return HfArgumentParser(kind).parse_args_into_dataclasses(values)[0]


def made(task, config, model_class):
    """Return the folder of a model with its tokenizer, which the first run with these `--models` makes."""
    folder = f"{options.models}/{task}"
    if not Path(folder, "config.json").exists():
        set_seed(7)
        inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
        model_class(config).save_pretrained(folder)
    return folder


def text(start, length):
    return " ".join(f"w{(start * 7 + place * place) % 120}" for place in range(length))


def resized(model, tokenizer):
    """The vocabulary grows where the tokenizer has more words; nothing is to happen here."""
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer))
    return size


def finished(trainer, metrics, **more):
    trainer.save_metrics("eval", metrics)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    shapes = {name: list(parameter.shape) for name, parameter in trainer.model.named_parameters()}
    reproducible = {
        name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name
    }
    return {"losses": losses, "metrics": reproducible, "shapes": shapes, **more}


def train(trainer):
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def clm():
    settings = arguments(TrainingArguments, "clm")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = made("clm", LlamaConfig(vocab_size=VOCABULARY, **sizes), LlamaForCausalLM)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
    size = resized(model, tokenizer)
    raw = datasets.Dataset.from_dict({"text": [text(number, 20 + number) for number in range(12)]})
    block = 16

    def grouped(examples):
        ids = [token for sequence in tokenizer(examples["text"])["input_ids"] for token in sequence]
        blocks = [ids[place : place + block] for place in range(0, len(ids) // block * block, block)]
        return {"input_ids": blocks, "labels": [list(block_ids) for block_ids in blocks]}

    with settings.main_process_first(desc="grouping"):
        dataset = raw.map(grouped, batched=True, remove_columns=["text"])
    trainer = Trainer(
        model,
        settings,
        train_dataset=dataset.select(range(12)),
        eval_dataset=dataset.select(range(12, 16)),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda prediction: {"accuracy": float((prediction[0][:, :-1] == prediction[1][:, 1:]).mean())},
    )
    train(trainer)
    metrics = trainer.evaluate()
    return finished(trainer, {**metrics, "perplexity": math.exp(metrics["eval_loss"])}, embedding=size)


def translation():
    more = ["--predict_with_generate", "true", "--generation_max_length", "8", "--generation_num_beams", "2"]
    settings = arguments(Seq2SeqTrainingArguments, "translation", *more)
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    folder = made("translation", config, T5ForConditionalGeneration)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    size = resized(model, tokenizer)
    raw = datasets.Dataset.from_dict(
        {
            "en": [text(number, 5 + number % 4) for number in range(14)],
            "de": [text(number + 3, 5) for number in range(14)],
        }
    )

    def tokenized(examples):
        return {**tokenizer(examples["en"]), "labels": tokenizer(text_target=examples["de"])["input_ids"]}

    with settings.main_process_first(desc="tokenizing"):
        dataset = raw.map(tokenized, batched=True, remove_columns=["en", "de"])

    def lengths(prediction):
        return {"length": float(np.mean((prediction.predictions != tokenizer.pad_token_id).sum(-1)))}

    trainer = Seq2SeqTrainer(
        model,
        settings,
        train_dataset=dataset.select(range(10)),
        eval_dataset=dataset.select(range(10, 14)),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=lengths,
    )
    train(trainer)
    metrics = trainer.evaluate(max_length=8, num_beams=2, metric_key_prefix="eval")
    predicted = trainer.predict(dataset.select(range(10, 14)), metric_key_prefix="predict", max_length=8, num_beams=2)
    return finished(trainer, metrics, embedding=size, predicted=predicted.predictions.tolist())


def classification():
    settings = arguments(TrainingArguments, "classification")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes, **dropout)
    folder = made("classification", config, BertForSequenceClassification)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=False)
    raw = datasets.Dataset.from_dict(
        {"text": [text(number, 6 + number % 5) for number in range(14)], "label": [number % 3 for number in range(14)]}
    )
    with settings.main_process_first(desc="tokenizing"):
        dataset = raw.map(lambda example: tokenizer(example["text"], truncation=True, max_length=16), batched=True)
    trainer = Trainer(
        model,
        settings,
        train_dataset=dataset.select(range(10)),
        eval_dataset=dataset.select(range(10, 14)),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda prediction: {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        },
    )
    train(trainer)
    return finished(trainer, trainer.evaluate(), embedding=resized(model, tokenizer))


results = {"clm": clm(), "translation": translation(), "classification": classification()}
Path(options.losses).write_text(json.dumps(results))
