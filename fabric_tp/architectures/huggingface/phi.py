from dataclasses import replace

from fabric_tp.architectures.huggingface.description import HUGGINGFACE

PHI = replace(
    HUGGINGFACE, name="phi", description="a Transformers Phi or Persimmon", norm="model.final_layernorm", tested=()
)
