"""What touches files and services: tables, images, and later objects, versions, tracking."""
