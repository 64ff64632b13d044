"""The training loop of the README as a script that runs:

    python recipes/minimal.py
    fabric run recipes/minimal.py --accelerator cpu --devices 2
    torchrun --nproc-per-node 2 recipes/minimal.py

The losses are the same each time.
"""

# mypy: ignore-errors

import torch
from litgpt import GPT
from torch.utils.data import DataLoader

import fabric_tp

strategy = fabric_tp.TensorParallelStrategy(fabric_tp.litgpt())  # splits each layer over all processes of a machine
fabric = fabric_tp.launch(strategy)
fabric.seed_everything(42)

with fabric.init_module(empty_init=True):
    model = GPT.from_name(
        "Llama-3.2-1B", block_size=64, padded_vocab_size=512, n_layer=2, n_embd=128, n_head=8, intermediate_size=256
    )
model = fabric.setup(model)
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))

# Token sequences that count. Every process makes all of them; Fabric's sampler gives each group of processes its part.
samples = [torch.arange(start, start + 65) % 512 for start in range(0, 512, 4)]
dataloader = fabric.setup_dataloaders(DataLoader(samples, batch_size=8, shuffle=True))

for step, tokens in enumerate(dataloader, start=1):
    loss = fabric_tp.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}: loss {loss.item():.5f}")
