"""What a bundle holds, in words, as data and as a picture. Reads bundle.json and decodes nothing."""
