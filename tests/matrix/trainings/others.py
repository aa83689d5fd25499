"""Trainers built on transformers', a loop of accelerate's without any, and quantized weights under adapters."""

import sys

import torch
from common import MODELS, NAME, OUTPUT, ROWS, arguments, token_rows, train, words, write
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def sentence_transformers():
    import sentence_transformers as library
    from datasets import Dataset

    data = Dataset.from_list([{"anchor": words(row, 8), "positive": words(row + 1, 8)} for row in range(32)])
    model = library.SentenceTransformer(str(MODELS / "sentences"), model_kwargs={"device_map": "auto"})
    loss = library.losses.MultipleNegativesRankingLoss(model)
    settings = arguments(library.SentenceTransformerTrainingArguments)
    train(library.SentenceTransformerTrainer(model, settings, train_dataset=data, loss=loss), kind="sentences")


def setfit():
    import setfit as library
    from datasets import Dataset

    data = Dataset.from_list([{"text": words(row, 8), "label": row % 2} for row in range(8)])
    model = library.SetFitModel.from_pretrained(str(MODELS / "sentences"))
    settings = library.TrainingArguments(output_dir=str(OUTPUT), batch_size=ROWS, max_steps=3, report_to="none",
                                         save_strategy="no", logging_steps=1)  # fmt: skip
    loop = library.Trainer(model=model, args=settings, train_dataset=data)
    loop.train()
    write([entry["embedding_loss"] for entry in loop.state.log_history if "embedding_loss" in entry], kind="none")


def accelerate_loop():
    from accelerate import Accelerator

    accelerator = Accelerator()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama", device_map="auto")
    data = [{name: torch.tensor(row[name]) for name in row} for row in token_rows(12)]
    loader = torch.utils.data.DataLoader(data, batch_size=ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    whole = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(OUTPUT / "saved", state_dict=whole)
        write(losses, kind="CausalLM", processes=accelerator.num_processes)


def quantized(**how):
    import peft

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama", device_map="auto", **how)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    loop = Trainer(peft.get_peft_model(model, lora), arguments(TrainingArguments), train_dataset=token_rows())
    train(loop, kind="PEFT", base="llama")


def bits_and_bytes(**how):
    from transformers import BitsAndBytesConfig

    quantized(quantization_config=BitsAndBytesConfig(**how))


def four_bits():
    bits_and_bytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def eight_bits():
    bits_and_bytes(load_in_8bit=True)


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantized(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


getattr(sys.modules[__name__], NAME)()
