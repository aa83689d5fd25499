"""Models that cannot be constructed of empty weights, parts of models that no Trainer trains, weights in a loss.

python parts.py --models FOLDER --output FOLDER --losses FILE [--batch-size 2]
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPModel,
    Trainer,
    TrainingArguments,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--models", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
options = parser.parse_args()

arguments = TrainingArguments(
    output_dir=options.output, max_steps=2, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
)  # fmt: skip
seen, trained = {}, {}


def load(kind, name, **more):
    set_seed(7)
    return kind.from_pretrained(Path(options.models, name), device_map="auto", **more)


def size_of(tensor):
    return float(tensor.double().abs().sum())


ids = torch.arange(3, 19).view(2, 8)

clip = load(CLIPModel, "clip")
pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
with torch.no_grad():
    text, picture = clip.get_text_features(input_ids=ids), clip.get_image_features(pixel_values=pixels)
    seen["text"] = size_of(getattr(text, "pooler_output", text))
    seen["picture"] = size_of(getattr(picture, "pooler_output", picture))
    seen["similarity"] = size_of(clip(input_ids=ids, pixel_values=pixels).logits_per_image)
    seen["scale"] = [clip.logit_scale.item(), clip.logit_scale.dim()]
seen["map"] = sorted(getattr(clip, "hf_device_map", ()))

head = load(
    AutoModelForSequenceClassification, "classifier", num_labels=3, ignore_mismatched_sizes=True, pad_token_id=0
)
with torch.no_grad():
    seen["hidden"] = size_of(head.model(ids).last_hidden_state)
    seen["head"] = [size_of(head.score(head.model(ids).last_hidden_state)), *head.score.weight.shape]
    seen["embedded"] = size_of(head.get_input_embeddings()(ids))

whisper = load(WhisperForConditionalGeneration, "whisper")
with torch.no_grad():
    features = torch.sin(torch.arange(1600.0) / 50).view(1, 16, 100)
    seen["positions"] = size_of(whisper.get_encoder()(features).last_hidden_state)
    seen["speech"] = size_of(whisper(input_features=features, decoder_input_ids=ids[:1]).logits)

wav2vec2 = load(Wav2Vec2ForCTC, "wav2vec2")
wav2vec2.freeze_feature_encoder()
examples = [
    {"input_values": torch.sin(torch.arange(400.0) * (n + 1) / 90), "labels": torch.arange(4) + n} for n in range(8)
]
trainer = Trainer(wav2vec2, arguments, train_dataset=examples)
trainer.train()
trained["speech"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
wav2vec2.save_pretrained(Path(options.output, "wav2vec2"))

teacher = load(AutoModelForCausalLM, "llama")
student = load(AutoModelForCausalLM, "llama")
seen["norm"] = float(student.lm_head.weight.norm())  # with gradients, which nobody asks for
try:
    functional.linear(torch.ones(1, 64), teacher.lm_head.weight).sum().backward()
    seen["untrained"] = "computed"
except RuntimeError as error:
    seen["untrained"] = str(error)
teacher.requires_grad_(False)


class InChunks(Trainer):
    """A loss from the weights of two heads, one of which trains, and a teacher's hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True)
        hidden = outputs.hidden_states[-1]
        weight = self.accelerator.unwrap_model(model).lm_head.weight
        with torch.no_grad():
            taught = teacher.model(inputs["input_ids"].roll(1, 1)).last_hidden_state
        loss = sum(
            functional.cross_entropy(functional.linear(part, weight).flatten(0, 1), label.flatten())
            for part, label in zip(hidden[:, :-1].split(4, 1), labels[:, 1:].split(4, 1), strict=True)
        )
        loss = loss + (hidden @ teacher.lm_head.weight.t() - taught @ teacher.lm_head.weight.t()).square().mean()
        loss = loss + 1e-3 * weight.square().sum() + outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


examples = [{"input_ids": (sequence := (torch.arange(9) * 3 + n) % 120 + 1), "labels": sequence} for n in range(8)]
trainer = InChunks(student, arguments, train_dataset=examples)
trainer.train()
for key in ("loss", "grad_norm"):
    trained[key] = [entry[key] for entry in trainer.state.log_history if key in entry]
with torch.no_grad():
    tokens = student.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
seen["generated"] = tokens.flatten().tolist()
if arguments.process_index == 0:
    Path(options.losses).write_text(json.dumps(seen) + "\n" + json.dumps(trained) + "\n")
