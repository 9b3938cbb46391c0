"""What a candidate would cost: its own training step, run on shapes alone.

This room reads how the train stage works and is read by no stage.
"""
