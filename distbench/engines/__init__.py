"""What executes a model: one module per engine."""
