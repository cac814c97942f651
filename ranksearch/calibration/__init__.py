"""What a few batches show of a net's layers: moments, gradients, metrics; and decomposed layers that are fitted to the dense ones."""
