"""Plain tensors and autograd functions: collectives, linear layers, norms and activations that keep little."""
