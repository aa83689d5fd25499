"""A stand-in for the remote code of InternVL 2.5, with its rule of what may not be split. No code of it is used here.

`models.py` puts this file into the checkpoint's folder, and `from_pretrained(..., trust_remote_code=True)` runs it from
there, as it runs the code that comes with the real checkpoints. What matters for placement is as it is there: the
names `vision_model`, `mlp1` and `language_model`; the rule that the *whole* vision model is one unsplittable block; a
configuration whose text part is called `llm_config`; and a loss computed outside the language model. The parts inside
are the library's, of the same sizes. Unlike there, tensors are brought to the device of what they meet: the original
only runs under maps that keep vision model, embedding and head together.
"""

from torch import nn
from transformers import GenerationMixin, InternVLVisionConfig, InternVLVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    sub_configs = {"vision_config": InternVLVisionConfig, "llm_config": LlamaConfig}  # noqa: RUF012 - as the library's

    def __init__(self, vision_config=None, llm_config=None, image_token_id=92546, downsample_ratio=0.5, **kwargs):
        self.vision_config = _config(vision_config, InternVLVisionConfig)
        self.llm_config = _config(llm_config, LlamaConfig)
        self.image_token_id = image_token_id
        self.downsample_ratio = downsample_ratio
        super().__init__(**kwargs)


def _config(value, kind):
    return value if isinstance(value, kind) else kind(**(value or {}))


class InternVisionModel(InternVLVisionModel):
    """The vision model, under the name that the rule below uses."""


class InternVLChatModel(PreTrainedModel, GenerationMixin):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["InternVisionModel", "LlamaDecoderLayer"]  # noqa: RUF012 - as the library's

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = LlamaForCausalLM(config.llm_config)
        self.merged = int(1 / config.downsample_ratio)  # patches a side that become one token
        width = config.vision_config.hidden_size * self.merged**2
        hidden = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def extract_feature(self, pixel_values):
        """Return one row of the text's width for each token of the tiles in `pixel_values` (tiles, 3, side, side)."""
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]  # without the class token
        tiles, count, width = patches.shape
        side, merged = int(count**0.5), self.merged
        grid = patches.view(tiles, side // merged, merged, side // merged, merged, width)
        grid = grid.permute(0, 1, 3, 2, 4, 5).reshape(tiles, count // merged**2, width * merged**2)
        return self.mlp1(grid)

    def forward(self, pixel_values, input_ids, attention_mask=None, image_flags=None, labels=None, **kwargs):
        embeddings = self.get_input_embeddings()(input_ids)
        features = self.extract_feature(pixel_values)
        if image_flags is not None:  # rows without a picture come with an empty tile
            features = features[image_flags.squeeze(-1).to(features.device) == 1]
        places = (input_ids == self.config.image_token_id).unsqueeze(-1).to(embeddings.device)
        embeddings = embeddings.masked_scatter(places, features.to(embeddings.device, embeddings.dtype))
        output = self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False)
        loss = None
        if labels is not None:
            logits = output.logits[:, :-1].float()
            targets = labels[:, 1:].to(logits.device)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=output.logits)
