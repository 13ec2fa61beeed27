"""One file a task: a config, a model, data, and the loss of one micro-batch."""
