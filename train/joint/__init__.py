"""Training of the joint transformer: objective, dataset, LoRA, export. Start with `objective`."""
