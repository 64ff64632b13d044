from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward

LLAMA = Architecture(
    name="llama",
    description="a Llama in Meta's names (tok_embeddings, layers.*.attention.wq, layers.*.feed_forward.w1, output)",
    embedding="tok_embeddings",
    blocks="layers",
    block=Block(
        norms=("attention_norm", "ffn_norm"),
        attention=Attention(
            name="attention",
            heads=("n_heads", "n_kv_heads", "n_local_heads", "n_local_kv_heads"),
            inputs=("wq", "wk", "wv"),
            outputs=("wo",),
        ),
        feed_forward=FeedForward(name="feed_forward", inputs=("w1", "w3"), outputs=("w2",)),
    ),
    norm="norm",
    head="output",
)
