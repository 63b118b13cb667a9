"""Sources of the example models: the nets as Python, the configurations as they are copied."""
