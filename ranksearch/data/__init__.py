"""Where batches come from: tensors on the device or loaders, in which order, which part of them each process takes, and where files lie."""
