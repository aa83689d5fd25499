"""Small models of real classes on the meta device: their shape in miniature, no weights."""

from typing import Any

import torch
import transformers

from balance_shim.versions import version_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})
    return on_meta(transformers.LlamaForCausalLM, config)


def saved_llama(folder: Any, **changes: Any) -> Any:
    """Write a small Llama, untied by default, with random weights and no tokenizer, to `folder` and return it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Any, vocabulary_size: int = 500) -> None:
    """Write a tokenizer of the words w0, w1, ... to `folder`, for a model with a vocabulary of at least that size."""
    import tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number + 3 for number in range(vocabulary_size - 3)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=512)
    return on_meta(transformers.GPT2LMHeadModel, config)


def bert() -> Any:
    return on_meta(transformers.BertForMaskedLM, _bert_config())


def bert_classifier() -> Any:
    return on_meta(transformers.BertForSequenceClassification, _bert_config())


def _bert_config() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.BertConfig(**sizes, vocab_size=512)


def t5() -> Any:
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 3, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=512, decoder_start_token_id=0)
    return on_meta(transformers.T5ForConditionalGeneration, config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        **{**SIZES, "num_key_value_heads": 2}, num_local_experts=4, max_position_embeddings=512
    )
    return on_meta(transformers.MixtralForCausalLM, config)


def qwen2_vl() -> Any:
    """Return the generation before: its tower's width is the text's, and 5.x refuses pictures without token types."""
    text = {**SIZES, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"embed_dim": 32, "hidden_size": 64, "depth": 3, "num_heads": 2}
    config = transformers.Qwen2VLConfig(**text, vision_config=vision)
    config.image_token_id, config.video_token_id, config.vision_start_token_id = 500, 501, 502
    return on_meta(transformers.Qwen2VLForConditionalGeneration, config)


def qwen_vl() -> Any:
    text = {**SIZES, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"hidden_size": 32, "out_hidden_size": 64, "depth": 3, "num_heads": 2, "intermediate_size": 64}
    config = transformers.Qwen2_5_VLConfig(**text, vision_config=vision)
    config.image_token_id, config.video_token_id, config.vision_start_token_id = 500, 501, 502
    return on_meta(transformers.Qwen2_5_VLForConditionalGeneration, config)


def llava() -> Any:
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return on_meta(transformers.LlavaForConditionalGeneration, config)


class WholeTowerModel(torch.nn.Module):
    """A stand-in for remote-code InternVLChatModel, whose vision tower is declared unsplittable as a whole."""

    _no_split_modules = ("Tower", "LlamaDecoderLayer")

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = Tower()
        self.mlp1 = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 64))
        self.language_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()


class Tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = torch.nn.Parameter(torch.zeros(4, 32))
        self.encoder = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))


def internvl_remote() -> Any:
    with torch.device("meta"):
        return WholeTowerModel()


def on_meta(model_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return model_class(config)


ALL = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
    "bert-classifier": bert_classifier,
    "t5": t5,
    "mixtral": mixtral,
    "qwen-vl": qwen_vl,
    "llava": llava,
    "internvl-remote": internvl_remote,
}
if version_of("transformers") < (4, 49):  # which brought Qwen2.5-VL
    del ALL["qwen-vl"]
