"""Fine-tuning on little data: arms, runs, tables."""
