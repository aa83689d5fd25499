"""Prompts that PEFT computes when it saves them: from whole weights, by the first rank alone."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from balance_shim.zero.weights import prompts
from tests import models

CONFIGS = {
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_are_computed_from_the_weights_that_are_saved(name):
    """Not from the encoder's own, which are partitioned, nor with its hooks; the encoder itself is as it was."""
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**models.SIZES)), CONFIGS[name]())
    encoder = model.prompt_encoder["default"]
    expected = model.get_prompt_embedding_to_save("default")
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    called = []
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    for module in encoder.modules():
        module.register_forward_pre_hook(lambda *_: called.append(1))
    with prompts.computed_from(weights, model):
        torch.testing.assert_close(model.get_prompt_embedding_to_save("default"), expected)
    assert not called and model.prompt_encoder["default"] is encoder
    assert not model.get_prompt_embedding_to_save("default").any() and called


def test_a_model_without_prompts_is_left_alone():
    with prompts.computed_from({}, torch.nn.Linear(2, 2)):
        pass
