"""Turbo: heads that draft tokens ahead, distilled from the finished model (`tasks/speculate/`)."""
