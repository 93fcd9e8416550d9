"""Everything around the model: arguments, data, training loop, metrics, results."""
