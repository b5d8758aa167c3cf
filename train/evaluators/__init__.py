"""Training of the evaluator networks. Start with `train_evaluator`."""
