"""What a run's records show: pictures, and one HTML page."""
