#!/usr/bin/env python3
"""Train an image classifier with timm's command line and adversarial feature augmentation: see ``--help``."""

from timm_alfa.train import main

if __name__ == "__main__":
    main()
