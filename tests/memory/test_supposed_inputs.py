"""The batches that the dry run makes up: what each class takes, so that no block is left that nothing reaches."""

import pytest
import transformers

from balance_shim.memory.profile import profile
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.versions import version_of
from tests import models

WORKLOAD = Workload(batch_size=2, seq_len=64)
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}


def question_answering():
    return models.on_meta(transformers.BertForQuestionAnswering, transformers.BertConfig(**TEXT, vocab_size=128))


def multiple_choice():
    return models.on_meta(transformers.BertForMultipleChoice, transformers.BertConfig(**TEXT, vocab_size=128))


def pictures():
    config = transformers.ViTConfig(**TEXT, image_size=32, patch_size=8)
    return models.on_meta(transformers.ViTForImageClassification, config)


def speech():
    config = transformers.Wav2Vec2Config(
        **TEXT, vocab_size=24, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.3, mask_time_length=4, layerdrop=0.5,
    )  # fmt: skip
    return models.on_meta(transformers.Wav2Vec2ForCTC, config)


def cross_attention_to_pictures():
    vision = transformers.models.mllama.configuration_mllama.MllamaVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_global_layers=2, attention_heads=2, intermediate_size=48,
        vision_output_dim=96, image_size=28, patch_size=14, intermediate_layers_indices=[1, 2],
    )  # fmt: skip
    text = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **TEXT, vocab_size=512, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0,
    )  # fmt: skip
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=500)
    return models.on_meta(transformers.MllamaForConditionalGeneration, config)


VISION = {**TEXT, "image_size": 16, "patch_size": 8}


def mask_of_pictures():
    config = transformers.Kosmos2Config(
        text_config={"vocab_size": 128, "embed_dim": 32, "layers": 4, "ffn_dim": 48, "attention_heads": 4},
        vision_config={**VISION, "hidden_act": "quick_gelu"}, latent_query_num=4,
    )  # fmt: skip
    return models.on_meta(transformers.Kosmos2ForConditionalGeneration, config)


def patches_in_the_language_model():
    config = transformers.FuyuConfig(
        **TEXT, vocab_size=256, patch_size=4, image_token_id=200,
        text_config={**TEXT, "vocab_size": 256, "model_type": "persimmon"},
    )  # fmt: skip
    return models.on_meta(transformers.FuyuForCausalLM, config)


def question_to_a_picture():
    config = transformers.InstructBlipConfig(
        vision_config=VISION, num_query_tokens=4, image_token_index=200,
        qformer_config={**TEXT, "vocab_size": 128, "encoder_hidden_size": 64},
        text_config={"model_type": "opt", "vocab_size": 256, "hidden_size": 64, "word_embed_proj_dim": 64,
                     "ffn_dim": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    )  # fmt: skip
    return models.on_meta(transformers.InstructBlipForConditionalGeneration, config)


def pictures_that_may_be_padding():
    config = transformers.Idefics3Config(
        vision_config={**VISION, "image_size": 16, "patch_size": 4}, image_token_id=200, scale_factor=2,
        text_config={**TEXT, "model_type": "llama", "vocab_size": 256, "pad_token_id": 0},
    )  # fmt: skip
    return models.on_meta(transformers.Idefics3ForConditionalGeneration, config)


def patches_with_their_places():
    config = transformers.Pix2StructConfig(
        text_config={"vocab_size": 128, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4},
        vision_config={"hidden_size": 32, "patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 48,
                       "num_hidden_layers": 4, "num_attention_heads": 4},
    )  # fmt: skip
    return models.on_meta(transformers.Pix2StructForConditionalGeneration, config)


NEW = version_of("transformers") >= (5, 0)
FAMILIES = [mask_of_pictures, patches_in_the_language_model, patches_with_their_places]
if NEW:  # 4.51: InstructBLIP stops across devices where it joins masks, Idefics 3 does not count its pictures' features
    FAMILIES += [question_to_a_picture, pictures_that_may_be_padding]


@pytest.mark.parametrize("make", FAMILIES)
def test_pictures_in_a_layout_of_their_own_reach_the_tower(make):
    """Kosmos-2, Fuyu, InstructBLIP, Idefics 3, Pix2Struct: the tower and what brings it to the language model run."""
    model = make()
    model_profile = profile(TrainingCase.of(model, WORKLOAD))
    assert model_profile.method == "traced" and not model_profile.unreached


def test_a_config_with_several_ends_of_text_is_traced():
    """Llama 3.1 has three tokens as `eos_token_id`."""
    model = models.llama(eos_token_id=[2, 7, 9])
    assert profile(TrainingCase.of(model, WORKLOAD)).method == "traced"


@pytest.mark.parametrize(
    "make", [question_answering, multiple_choice, pictures, speech, *([cross_attention_to_pictures] if NEW else [])]
)
def test_the_dry_run_reaches_every_block(make):
    """Heads with targets of other names, pictures, sound, and layers that are left out at random: all have run."""
    model = make()
    model_profile = profile(TrainingCase.of(model, WORKLOAD))
    assert model_profile.method == "traced" and not model_profile.unreached - {"bert.pooler"}


@pytest.mark.parametrize(("make", "head"), [(question_answering, "qa_outputs"), (speech, "lm_head")])
def test_a_head_that_meets_its_targets_where_they_arrive_is_bonded_to_the_first_device(make, head):
    """The loss itself is run, so that the source of `forward` need not tell."""
    model = make()
    assert head in profile(TrainingCase.of(model, WORKLOAD)).constraints.on_first
