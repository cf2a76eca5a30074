"""How a step runs: recorded forwards, replayed tails, and what must stay as it was around them. Knows no timm."""
