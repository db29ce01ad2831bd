"""What is segmented: images or volumes."""
