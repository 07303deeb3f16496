"""What is known about tokenizers: encoding, word boundaries, stop words."""
