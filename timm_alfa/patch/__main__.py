"""``python -m timm_alfa.patch``."""

from .command import main

if __name__ == "__main__":
    main()
