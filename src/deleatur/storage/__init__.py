"""Files, images and tensors on disk and in object storage; DVC and Git."""
