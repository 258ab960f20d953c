"""From files to batches: datasets, decoding, augmentation."""
