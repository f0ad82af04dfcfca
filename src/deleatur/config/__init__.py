"""params.yaml → validated settings and the methods they name."""
