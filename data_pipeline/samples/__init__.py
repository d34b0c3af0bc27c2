"""What a sample is, and the safe decoding of its images and text."""
