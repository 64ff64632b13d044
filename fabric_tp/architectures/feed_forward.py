from fabric_tp.architectures.architecture import Architecture, FeedForward

FEED_FORWARD = Architecture(
    name="feed_forward",
    description="a SwiGLU MLP with linear layers w1, w2 and w3, or a model made of such",
    feed_forward=FeedForward(name="", inputs=("w1", "w3"), outputs=("w2",)),
)
