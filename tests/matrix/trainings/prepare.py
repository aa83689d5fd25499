"""Write the small models that the trainings of the matrix start from, with random weights: prepare.py MODELS."""

import sys
from pathlib import Path

import tokenizers
import torch
import transformers

FOLDER = Path(sys.argv[1])
TEXT = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CHAT = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save(name, model):
    model.save_pretrained(FOLDER / name)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number + 3 for number in range(497)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(FOLDER / name)


torch.manual_seed(0)
llama = {**TEXT, "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 2}
save("llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)))
save("reward", transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**llama, num_labels=1)))
save("experts", transformers.MixtralForCausalLM(transformers.MixtralConfig(**llama, num_local_experts=4)))
t5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
save("t5", transformers.T5ForConditionalGeneration(
    transformers.T5Config(**t5, vocab_size=512, decoder_start_token_id=2, pad_token_id=2, eos_token_id=2)))  # fmt: skip
bert = {**ENCODER, **UNDROPPED, "vocab_size": 512, "pad_token_id": 2}
save("classifier", transformers.BertForSequenceClassification(transformers.BertConfig(**bert, num_labels=3)))
save("answers", transformers.BertForQuestionAnswering(transformers.BertConfig(**bert)))
save("sentences", transformers.BertModel(transformers.BertConfig(**bert)))
picture = transformers.ViTConfig(**ENCODER, **UNDROPPED, image_size=28, patch_size=14, num_labels=3)
save("pictures", transformers.ViTForImageClassification(picture))
sound = transformers.Wav2Vec2Config(
    **ENCODER, vocab_size=32, conv_dim=(32, 32), conv_kernel=(10, 8), conv_stride=(5, 4), num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, num_feat_extract_layers=2,
)  # fmt: skip
save("sound", transformers.Wav2Vec2ForCTC(sound))
