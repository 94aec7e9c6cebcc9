"""Other libraries, served; each module needs that library installed."""
