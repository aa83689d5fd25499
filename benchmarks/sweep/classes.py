"""The model classes that the sweep trains: those that the auto classes of the installed transformers name, by task."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

# Tasks in the order of the table, each with the mappings of `transformers.models.auto.modeling_auto` that name its
# classes. A class that several tasks name is trained for the first of them.
TASKS: dict[str, tuple[str, ...]] = {
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT", "VISION_2_SEQ"),
    "speech-seq2seq": ("SPEECH_SEQ_2_SEQ",),
    "causal-lm": ("CAUSAL_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "ctc": ("CTC",),
    "question-answering": ("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING"),
    "token-classification": ("TOKEN_CLASSIFICATION",),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION",),
    "masked-lm": ("MASKED_LM",),
    "multiple-choice": ("MULTIPLE_CHOICE",),
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "segmentation": ("SEMANTIC_SEGMENTATION", "IMAGE_SEGMENTATION"),
    "instance-segmentation": ("INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION"),
    "detection": ("OBJECT_DETECTION",),
    "depth": ("DEPTH_ESTIMATION",),
    "masked-image": ("MASKED_IMAGE_MODELING",),
    "video-classification": ("VIDEO_CLASSIFICATION",),
    "audio-classification": ("AUDIO_CLASSIFICATION",),
    "visual-question-answering": ("VISUAL_QUESTION_ANSWERING",),
}


@dataclass(frozen=True)
class Candidate:
    """One class to train. `model_type` is that of the config under which the auto class names it."""

    name: str
    task: str
    model_type: str

    @property
    def model_class(self) -> Any:
        """The class itself; ImportError or AttributeError where transformers names a class that it does not have."""
        import transformers

        return getattr(transformers, self.name)


def candidates() -> list[Candidate]:
    """Return the classes of all tasks in the order of the table, each class once."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    by_name: dict[str, Candidate] = {}
    for task, mappings in TASKS.items():
        for mapping in mappings:
            names = getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
            for model_type, classes in names.items():
                for name in (classes,) if isinstance(classes, str) else classes:
                    by_name.setdefault(name, Candidate(name, task, model_type))
    return list(by_name.values())
