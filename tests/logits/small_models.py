"""Small models with heads of every kind, a batch for them, and a count of the logits that they make."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from balance_shim.logits import head
from balance_shim.logits.deferred import DeferredLogits

VOCABULARY, CHUNK, SEQUENCES, TOKENS = 640, 8, 2, 24
SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class MostRows(TorchDispatchMode):
    """Notes the most rows of values over the vocabulary that any operation has returned."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        weight = (SIZES["hidden_size"], VOCABULARY)
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,) and result.shape[-2:] != weight:
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


class PackedLinear(nn.Linear):
    """What a quantized linear layer looks like: whole numbers and a scale, made into a matrix on each call."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **SPECIAL, **changes))


def soft_capped():
    config = transformers.Gemma2Config(**SIZES, **SPECIAL, head_dim=12, final_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(config)


def scaled():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, **SPECIAL, logits_scaling=3.0))


def multiplied():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, **SPECIAL))


def gpt2():
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    no_dropout = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2))


def t5():
    sizes = {"d_model": 48, "d_ff": 96, "d_kv": 12, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0)
    return transformers.T5ForConditionalGeneration(config)


def bert():
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **no_dropout, vocab_size=VOCABULARY))


def quantized():
    model = llama()
    model.lm_head = PackedLinear(model.lm_head)
    return model


def with_lora_head():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave lora_A without gradients
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def with_head_kept_by_peft():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


MODELS = {
    "plain": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "soft-capped": soft_capped,
    "scaled": scaled,
    "multiplied": multiplied,
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "quantized": quantized,
    "lora": with_lora_head,
    "modules to save": with_head_kept_by_peft,
}


def build(name="plain"):
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch(ignored=True):
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, TOKENS))
    labels = ids.clone()
    if ignored:
        labels[0, :11] = -100
    return {"input_ids": ids, "labels": labels}


def deferred_outputs(model, **inputs):
    with head.deferring(model):
        outputs = model(**(inputs or batch()))
    assert type(outputs.logits) is DeferredLogits
    return outputs
