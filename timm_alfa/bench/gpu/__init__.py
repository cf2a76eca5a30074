"""Everything that is worth a GPU's minutes: the suite there, and the cost of a step for six models."""
