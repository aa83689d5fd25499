"""Where the longest sequence that a trainer lets through is found."""

from types import SimpleNamespace as Thing

import pytest

from balance_shim.memory.sequence_length import of_arguments, of_trainer


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"max_length": 1024}, 1024),
        ({"max_length": None, "max_seq_length": 512}, 512),
        ({"model_max_length": 4096}, 4096),
        ({"block_size": 256}, 256),
        ({"max_prompt_length": 100, "max_completion_length": 28}, 128),
        ({"max_length": 90, "max_prompt_length": 100, "max_completion_length": 28}, 90),
        ({"max_completion_length": 28}, None),
        ({"max_length": True, "block_size": -1, "model_max_length": 10**30}, None),
        ({}, None),
    ],
)
def test_arguments(given, length):
    """The first limit that is set counts; prompts and completions add up; what is no length is none."""
    assert of_arguments(Thing(**given)) == length


def trainer(**given):
    return Thing(args=Thing(), **given)


def test_a_trainers_tools():
    """ms-swift's template, the trainer itself, and a collator that pads to a length."""
    assert of_trainer(trainer(template=Thing(max_length=8192), max_seq_length=1)) == 8192
    assert of_trainer(trainer(max_seq_length=700)) == 700
    assert of_trainer(trainer(data_collator=Thing(padding="max_length", max_length=300))) == 300
    assert of_trainer(trainer(data_collator=Thing(padding=True, max_length=300))) is None
    assert of_trainer(trainer()) is None


def test_a_tokenizer_counts_where_it_has_truncated():
    """`model_max_length` alone cuts nothing; a call with truncation leaves its limit behind."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    word_level = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(word_level), model_max_length=77
    )
    assert of_trainer(trainer(processing_class=tokenizer)) is None
    tokenizer("a a a", truncation=True, max_length=50)
    assert of_trainer(trainer(processing_class=tokenizer)) == 50
    assert of_trainer(trainer(tokenizer=Thing(tokenizer=tokenizer))) == 50
    arguments = Thing(max_completion_length=9)
    assert of_trainer(Thing(args=arguments, processing_class=tokenizer)) is None, "completions come on top"
