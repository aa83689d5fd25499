"""Prediction steps in portions of their rows give the loss, the outputs and the labels of the whole batch."""

import pytest
import torch
import transformers

from balance_shim.training import prediction_steps
from tests import models

SEQUENCES, TOKENS = 5, 12
BERT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37,
    "num_labels": 3,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 37, "d_kv": 16, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}


def ragged(generator):
    """Labels of which each row has another number, the first of some rows among them."""
    labels = torch.randint(1, 90, (SEQUENCES, TOKENS), generator=generator)
    for number in range(SEQUENCES):
        labels[number, 2 + 2 * number :] = -100
    labels[1::2, 0] = -100
    return labels


def classes(generator):
    return torch.randint(0, 3, (SEQUENCES,), generator=generator)


def classes_of_tokens(generator):
    labels = ragged(generator)
    return torch.where(labels == -100, labels, labels % 3)


CASES = {
    "causal": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**models.SIZES)), ragged),
    "classes": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)), classes),
    "tokens": (lambda: transformers.BertForTokenClassification(transformers.BertConfig(**BERT)), classes_of_tokens),
    "decoder": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
                ragged),
}  # fmt: skip


def trainer_of(model, folder, trainer_class=transformers.Trainer):
    arguments = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True)
    return trainer_class(model=model, args=arguments)


@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_portions_give_the_whole(kind, to_host, tmp_path):
    """Whatever a model's loss is a mean over: portions count by their labels, and outputs keep the order of rows."""
    torch.manual_seed(0)
    make, labels = CASES[kind]
    trainer = trainer_of(make().eval(), tmp_path)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(1, 90, (SEQUENCES, TOKENS), generator=generator), "labels": labels(generator)}

    def perform(inputs):
        return trainer.prediction_step(trainer.model, inputs, False)

    assert prediction_steps.splits_exactly(trainer, batch, 3)
    loss, logits, wanted = perform(dict(batch))
    portioned = prediction_steps.in_portions(trainer, perform, batch, 3, to_host)
    assert portioned.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(portioned.logits, logits)
    assert torch.equal(portioned.labels, wanted)


class CouplesSequences(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.logits.flatten(1).std(0).mean()
        return (loss, outputs) if return_outputs else loss


def test_what_may_not_be_the_same_in_portions_is_not_split(tmp_path):
    """A loss of the script's own, a row alone, and losses of positions are left whole."""
    model = CASES["classes"][0]()
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(1, 90, (SEQUENCES, TOKENS), generator=generator), "labels": classes(generator)}
    trainer = trainer_of(model, tmp_path)
    assert prediction_steps.splits_exactly(trainer, batch, 2)
    assert not prediction_steps.splits_exactly(trainer_of(model, tmp_path, CouplesSequences), batch, 2)
    assert not prediction_steps.splits_exactly(trainer, {name: tensor[:1] for name, tensor in batch.items()}, 2)
    reader = trainer_of(transformers.BertForQuestionAnswering(transformers.BertConfig(**BERT)), tmp_path)
    spans = {"input_ids": batch["input_ids"], "start_positions": batch["labels"], "end_positions": batch["labels"]}
    assert not prediction_steps.splits_exactly(reader, spans, 2)


def test_outputs_that_are_not_by_rows_do_not_join(tmp_path):
    """A number for the whole batch among the outputs tells nothing of how portions make it."""
    trainer = trainer_of(CASES["classes"][0](), tmp_path)
    batch = {
        "input_ids": torch.ones(SEQUENCES, TOKENS, dtype=torch.long),
        "labels": torch.zeros(SEQUENCES, dtype=torch.long),
    }

    def perform(inputs):
        return torch.tensor(1.0), torch.tensor(2.0), inputs["labels"]

    with pytest.raises(prediction_steps.CannotJoin):
        prediction_steps.in_portions(trainer, perform, batch, 2, False)
