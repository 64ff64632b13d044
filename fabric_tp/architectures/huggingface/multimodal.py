from dataclasses import replace

from fabric_tp.architectures.huggingface.description import HUGGINGFACE

MULTIMODAL = replace(
    HUGGINGFACE,
    name="multimodal",
    description="a Transformers language model with a vision tower (Gemma 3, GOT-OCR 2)",
    embedding="model.language_model.embed_tokens",
    whole=("model.vision_tower", "model.multi_modal_projector", "model.vision_embed_tokens"),
    blocks="model.language_model.layers",
    norm="model.language_model.norm",
    tested=(),
)

FUYU = replace(MULTIMODAL, name="fuyu", description="a Transformers Fuyu", norm="model.language_model.final_layernorm")
