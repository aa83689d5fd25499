"""transformers' own trainers: the steps that its example scripts take for each task."""

import random
import sys
from dataclasses import dataclass

import transformers
from common import MODELS, NAME, OUTPUT, TOKENS, arguments, token_rows, tokenizer, train, with_tokenizer, words
from transformers import Trainer, TrainingArguments

NUMBERS = random.Random(1)


def load(kind, folder):
    """Return a model with a device map, or without one where its class has none in this version."""
    kind = getattr(transformers, kind)
    try:
        return kind.from_pretrained(MODELS / folder, device_map="auto")
    except ValueError as error:
        if "does not support `device_map" not in str(error):
            raise
        return kind.from_pretrained(MODELS / folder)


def trainer():
    """Accumulation, evaluation, the best model at the end."""
    more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    more |= {"load_best_model_at_end": True, "gradient_accumulation_steps": 2}
    data = {"train_dataset": token_rows(), "eval_dataset": token_rows(8)}
    train(Trainer(load("AutoModelForCausalLM", "llama"), arguments(TrainingArguments, **more), **data), kind="CausalLM")


def clm():
    """Parsed arguments, a vocabulary that may be resized, evaluation, and a checkpoint that training resumes from."""

    @dataclass
    class Own:
        block: int = TOKENS

    command = ["--output_dir", str(OUTPUT), "--block", str(TOKENS)]
    own, _ = transformers.HfArgumentParser((Own, TrainingArguments)).parse_args_into_dataclasses(args=command)
    data = [{"input_ids": row["input_ids"][: own.block], "labels": row["labels"][: own.block]} for row in token_rows()]
    for steps, resume in ((2, None), (4, True)):
        model = load("AutoModelForCausalLM", "llama")
        if len(tokenizer()) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer()))
        more = {
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": steps,
            "eval_strategy": "steps",
            "eval_steps": 2,
        }
        loop = Trainer(model, arguments(TrainingArguments, **more), train_dataset=data, eval_dataset=data[:8])
        if resume is None:
            loop.train()
    loop.train = _resuming(loop.train)
    train(loop, kind="CausalLM")


def _resuming(inner):
    return lambda: inner(resume_from_checkpoint=True)


def seq2seq():
    """Padding by a collator, and evaluation by generation."""
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = load("AutoModelForSeq2SeqLM", "t5")
    inner = tokenizer("t5")
    data = [{"input_ids": inner(words(row, 20 + row % 5))["input_ids"], "labels": inner(words(row + 1, 8))["input_ids"]}
            for row in range(32)]  # fmt: skip
    more = {"predict_with_generate": True, "generation_max_length": 12, "eval_strategy": "steps", "eval_steps": 3}
    loop = Seq2SeqTrainer(
        model, arguments(Seq2SeqTrainingArguments, **more), train_dataset=data, eval_dataset=data[:4],
        data_collator=DataCollatorForSeq2Seq(inner, model=model), **with_tokenizer(Seq2SeqTrainer, "t5"),
    )  # fmt: skip
    train(loop, kind="Seq2SeqLM")


def classification():
    inner = tokenizer("classifier")
    data = [{**inner(words(row, 16 + row % 8)), "labels": row % 3} for row in range(32)]
    more = {"eval_strategy": "steps", "eval_steps": 3}
    loop = Trainer(
        load("AutoModelForSequenceClassification", "classifier"), arguments(TrainingArguments, **more),
        train_dataset=data, eval_dataset=data[:8], compute_metrics=lambda seen: {"rows": len(seen.label_ids)},
        **with_tokenizer(Trainer, "classifier"),
    )  # fmt: skip
    train(loop, kind="SequenceClassification")


def answers():
    inner = tokenizer("answers")
    data = [{**inner(words(row, 8), words(row + 3, 20 + row % 6)), "start_positions": 10, "end_positions": 12 + row % 5}
            for row in range(32)]  # fmt: skip
    loop = Trainer(
        load("AutoModelForQuestionAnswering", "answers"), arguments(TrainingArguments), train_dataset=data,
        **with_tokenizer(Trainer, "answers"),
    )  # fmt: skip
    train(loop, kind="QuestionAnswering")


def pictures():
    import torch

    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.rand(3, 28, 28, generator=generator), "labels": row % 3} for row in range(32)]
    model = load("AutoModelForImageClassification", "pictures")
    loop = Trainer(model, arguments(TrainingArguments, remove_unused_columns=False), train_dataset=data)
    train(loop, kind="ImageClassification")


def sound():
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = range(32)
    labels = [[NUMBERS.randrange(1, 32) for _ in range(6)] for _ in rows]
    data = [{"input_values": torch.rand(2000, generator=generator), "labels": labels[row]} for row in rows]
    loop = Trainer(load("AutoModelForCTC", "sound"), arguments(TrainingArguments), train_dataset=data)
    train(loop, kind="CTC")


getattr(sys.modules[__name__], NAME)()
