"""Training: what a user runs lies here, its parts in packages. Start with `finetune`."""
