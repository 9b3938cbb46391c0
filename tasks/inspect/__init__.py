"""Every candidate tried on shapes alone, before any work."""
