"""The training library: configuration, data plan, engine, checkpoints, tracking. Knows no task."""

__version__ = "0.1.0"
