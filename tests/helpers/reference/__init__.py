"""Independent, slow, plain implementations that the package is compared with; nothing here imports it."""
