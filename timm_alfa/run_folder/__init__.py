"""The files of a run's folder: who writes them, who reads them."""
