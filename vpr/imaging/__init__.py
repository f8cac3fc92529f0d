"""Images: bounded decoding, the shared preprocessing, augmentation."""
